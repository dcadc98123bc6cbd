#!/bin/sh
# All that waits for a GPU, in one command: correctness first, then the kernels' speed, then vLLM with and without QAM-W.
#
#     kernels/benchmarks/run_gpu.sh OUT [MODEL CKPT]      in an environment with qamw-vllm[gpu,quantize], pytest and scipy
set -eu
out=$1
mkdir -p "$out"
here=$(dirname "$0")/../..

TRITON_INTERPRET=0 python -m pytest -q "$here/tests/kernel_checks.py" --junitxml "$out/kernel_checks.xml"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        TRITON_INTERPRET=0 compute-sanitizer --tool $tool --error-exitcode 1 \
            python -m pytest -q "$here/tests/kernel_checks.py" -k 'end_to_end or exact or routed' >"$out/$tool.log"
    done
fi
python "$here/kernels/benchmarks/bench_linear.py" "$out/linear.json" --save-crossing

if [ $# -ge 3 ]; then
    python -m pytest -q "$here/tests/test_experts.py" -k slots
    for model in "$2" "$3"; do
        name=$(basename "$model")
        for batch in 1 16 64 256; do
            vllm bench latency --model "$model" --batch-size $batch --input-len 128 --output-len 128 --jit-monitor-mode error \
                --output-json "$out/latency-$name-$batch.json"
        done
        vllm bench throughput --model "$model" --input-len 512 --output-len 128 --num-prompts 512 --output-json "$out/throughput-$name.json"
    done
    python "$here/tests/bench_serve.py" "$2" "$3" --options '--gpu-memory-utilization 0.4' --json "$out/serve.json" --plot "$out/serve.png"
fi
