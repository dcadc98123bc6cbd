#!/bin/sh
# All that waits for a GPU, in one command: correctness first, then the kernels' speed, then vLLM with and without QAM-W.
#
#     kernels/benchmarks/run_gpu.sh OUT [MODEL CKPT]      in an environment with qamw-vllm[gpu,quantize], pytest and scipy
set -eu
out=$1
mkdir -p "$out"
here=$(dirname "$0")/../..

failed=
TRITON_INTERPRET=0 python -m pytest -q "$here/tests/kernel_checks.py" --junitxml "$out/kernel_checks.xml" || failed="$failed kernel_checks"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        TRITON_INTERPRET=0 compute-sanitizer --tool $tool --error-exitcode 1 \
            python -m pytest -q "$here/tests/kernel_checks.py" -k 'end_to_end or exact or routed' >"$out/$tool.log" || failed="$failed $tool"
    done
fi
python "$here/kernels/benchmarks/bench_linear.py" "$out/linear.json" --save-crossing

if [ $# -ge 3 ]; then
    python -m pytest -q "$here/tests/test_experts.py" -k slots || failed="$failed experts"
    for model in "$2" "$3"; do
        name=$(basename "$model")
        for batch in 1 16 64 256; do
            vllm bench latency --model "$model" --batch-size $batch --input-len 128 --output-len 128 \
                --output-json "$out/latency-$name-$batch.json" >"$out/latency-$name-$batch.log" 2>&1
            # vLLM's monitor warns of what is compiled while it serves. Ours must not be.
            ! grep -E 'during inference: (rotate|gemm|routed_gemm|decode_gemm|dequantize)_kernel' "$out/latency-$name-$batch.log" \
                || failed="$failed compiled-while-serving"
        done
        vllm bench throughput --model "$model" --dataset-name random --random-input-len 512 --random-output-len 128 --num-prompts 512 \
            --output-json "$out/throughput-$name.json"
    done
    python "$here/tests/bench_serve.py" "$2" "$3" --options '--gpu-memory-utilization 0.4' --json "$out/serve.json" --plot "$out/serve.png"
fi
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
