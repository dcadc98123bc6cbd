#!/bin/sh
# Everything that needs a GPU, in one command: correctness first, then the speed of the kernels,
# then vLLM with and without QAM-W.
#
#     benchmarks/run_gpu.sh OUT [MODEL CKPT]
#
# In an environment with qamw-vllm[gpu,quantize], pytest and scipy. OUT is a directory for the
# results, MODEL and CKPT are directories of a plain model and of its QAM-W checkpoint.
set -eu
mkdir -p "$1"
out=$(realpath "$1")
model=
checkpoint=
if [ $# -ge 3 ]; then
    model=$(realpath "$2")
    checkpoint=$(realpath "$3")
fi
cd "$(dirname "$0")/.."

failed=
check() {
    TRITON_INTERPRET=0 "$@" -o 'python_files=check_*.py' tests/kernels_/ops/triton_checks
}
check python -m pytest -q --junitxml "$out/triton_checks.xml" || failed="$failed triton_checks"
if command -v compute-sanitizer >/dev/null; then
    # Of a small tile, lanes of the rotation kernel store the same element twice: racecheck alone
    # is read for what it found.
    for tool in memcheck synccheck racecheck; do
        code=1
        [ $tool != racecheck ] || code=0  # the exit code of pytest
        check compute-sanitizer --tool $tool --error-exitcode $code \
            python -m pytest -q -k 'end_to_end or exact or routed' >"$out/$tool.log" \
            || failed="$failed $tool"
    done
    ! grep 'Race reported' "$out/racecheck.log" | grep -v rotate_kernel \
        || failed="$failed racecheck"
fi
python -m pytest -q tests/kernels_/ops/test_routing.py || failed="$failed routing"
python -m benchmarks.kernels.linear "$out/linear.json" --save-crossover
python -m benchmarks.kernels.experts "$out/experts.json" || failed="$failed experts"
python -m benchmarks.serving.steps --json "$out/steps.json" || failed="$failed steps"

if [ -n "$model" ]; then
    python -m pytest -q tests/vllm_/test_experts.py -k slots || failed="$failed slots"
    for served in "$model" "$checkpoint"; do
        name=$(basename "$served")
        for batch in 1 16 64 256; do
            vllm bench latency --model "$served" --batch-size $batch \
                --input-len 128 --output-len 128 \
                --output-json "$out/latency-$name-$batch.json" \
                >"$out/latency-$name-$batch.log" 2>&1
            # vLLM's monitor warns of what is compiled while it serves. Ours must not be.
            ours='[a-z_]*(rotate|rotate_many|gemm|sums|dequantize)_kernel'
            ! grep -E "during inference: $ours" "$out/latency-$name-$batch.log" \
                || failed="$failed compiled-while-serving"
        done
        vllm bench throughput --model "$served" --dataset-name random \
            --random-input-len 512 --random-output-len 128 --num-prompts 512 \
            --output-json "$out/throughput-$name.json"
    done
    python -m benchmarks.serving.load "$model" "$checkpoint" \
        --options '--gpu-memory-utilization 0.4' \
        --json "$out/serve.json" --plot "$out/serve.png"
fi
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
