"""Speed of the quantised linear layer against cuBLAS in bfloat16, and where vLLM and humming-kernels are installed, Marlin and Humming.

    python kernels/benchmarks/bench_linear.py OUT.json [--models ...] [--index-bits 11] [--save-crossing]

First compares the results with float64, and gives no speed when one is wrong. Every time is a median over CUDA graphs, rotation
included, over as many copies of the weight as the L2 cache does not hold. OUT.json says what machine and versions it was, OUT.png
shows it. Without a GPU and with TRITON_INTERPRET=1, only the comparison runs.
"""

import argparse
import functools
import inspect
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from qamw_kernels.ops.gluon import launch as gluon_launch
from qamw_kernels.ops.triton import launch as triton_launch
from qamw_kernels.ops.linear import INTERPRETED, quadrant_words
from qamw_kernels.codec.rotation import hadamard
from qamw_kernels.ops.tiling import tiled_shape, untile
from qamw_kernels.ops.triton.launch import TiledWeight

# (N, K) of the fused layers: q/k/v, output, gate/up, down.
SHAPES = {
    "llama-2-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "llama-2-13b": ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),  # also Mistral-7B
    "qwen2.5-3b": ((2560, 2048), (2048, 2048), (22016, 2048), (2048, 11008)),
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 2048, 8192)
ROTATION_BLOCK_SIZE = 128
DTYPE = torch.bfloat16
WAYS = {"packed": triton_launch.multiply_packed, "dequantized": triton_launch.multiply_dequantized}


def random_weight(num_rows: int, num_inputs: int, index_bits: int, device: str) -> TiledWeight:
    """Random indices; speed does not depend on them, and what lies past the end of a tile is not looked at."""
    shape = tiled_shape(num_rows, num_inputs, index_bits)
    tiles = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
    row_norms = torch.rand(num_rows, device=device) / num_inputs**0.5 + 0.01
    input_scales = (torch.rand(num_inputs, device=device) + 0.5).half()
    return TiledWeight(tiles, row_norms, input_scales, quadrant_words(index_bits, device), ROTATION_BLOCK_SIZE)


def exact(weight: TiledWeight, x: torch.Tensor) -> torch.Tensor:
    """[M, N] float64, from the indices alone."""
    signs = torch.tensor([[1, 1], [-1, 1], [1, -1], [-1, -1]], device=x.device)
    quadrant = weight.quadrant_words[:, None].contiguous().view(torch.bfloat16).double()
    codebook = (signs[:, None] * quadrant).reshape(-1, 2)
    indices = untile(weight.tiles, len(weight.row_norms), x.shape[1]).int()
    matrix = hadamard(ROTATION_BLOCK_SIZE).to(x.device, torch.float64) / ROTATION_BLOCK_SIZE**0.5
    rotated = ((x.double() * weight.input_scales.double()).view(-1, ROTATION_BLOCK_SIZE) @ matrix).view(x.shape)
    y = torch.empty(len(x), len(indices), dtype=torch.float64, device=x.device)
    for rows in torch.arange(len(indices), device=x.device).split(1024):
        y[:, rows] = rotated @ codebook[indices[rows]].flatten(1).T * weight.row_norms[rows].double()
    return y


def check(num_rows: int, num_inputs: int, index_bits: int, tokens: tuple[int, ...], device: str) -> None:
    """Stop the program if a result is further from the truth than bfloat16 explains."""
    weight = random_weight(num_rows, num_inputs, index_bits, device)
    for num_tokens in tokens:
        x = torch.randn(num_tokens, num_inputs, dtype=DTYPE, device=device)
        truth = exact(weight, x)
        for name, multiply in WAYS.items():
            error = float((multiply(x, weight, None).double() - truth).norm() / truth.norm())
            if not error < 2**-7:
                sys.exit(f"{name}, {num_tokens} tokens, {num_rows} x {num_inputs}, {index_bits} index bits: relative error {error:.2g}, "
                         "no speed is given")


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"unknown: {error}"

    return {
        "gpu": torch.cuda.get_device_name(), "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": said("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"),
        "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "gluon": gluon_launch.kernels is not None, "commit": said("git", "describe", "--always", "--dirty"), "command": sys.argv,
    }


def microseconds(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """Median and spread (90 % less 10 %) of one call, in a CUDA graph that makes all of them in turn."""
    def all_calls() -> None:
        for call in calls:
            call()

    times = triton.testing.do_bench_cudagraph(all_calls, rep=20, quantiles=[0.5, 0.1, 0.9])
    median, low, high = (1000 * t / len(calls) for t in times)
    return median, high - low


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / (microseconds([lambda: target.copy_(source)])[0] / 1e6)


def marlin(num_rows: int, num_inputs: int, bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer with Marlin's weights of groups of 128."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    weight = torch.randn(num_inputs, num_rows, dtype=DTYPE, device="cuda") / num_inputs**0.5
    workspace, empty = marlin_utils.marlin_make_workspace_new(weight.device), torch.empty(0, dtype=torch.int32, device="cuda")
    order: dict[str, Any] = {}
    if "act_order" in inspect.signature(marlin_utils_test.marlin_quantize).parameters:  # vLLM 0.29 and older
        packed, scales = marlin_utils_test.marlin_quantize(weight, kind, 128, act_order=False)[1:3]
        order = {"g_idx": empty, "g_idx_sort_indices": empty, "is_k_full": True}
    else:
        packed, scales = marlin_utils_test.marlin_quantize(weight, kind, 128)[1:3]
    return lambda x: marlin_utils.apply_gptq_marlin_linear(
        input=x, weight=packed, weight_scale=scales, weight_zp=empty, workspace=workspace, wtype=kind, output_size_per_partition=num_rows,
        input_size_per_partition=num_inputs, **order)


def humming(num_rows: int, num_inputs: int, bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer with Humming's integers in groups of 128: the peers nearest in size, for it has 5 and 6 bits."""
    from humming.layer import HummingLayer

    with torch.device("cuda"):
        layer = HummingLayer(num_rows, num_inputs, {"dtype": f"int{bits}", "group_size": 128}, torch_dtype=DTYPE)
        layer.load_from_unquantized(torch.randn(num_rows, num_inputs, dtype=DTYPE) / num_inputs**0.5)
        layer.transform()
    return layer


REFERENCES = {"marlin-int4": (marlin, 4), "marlin-int8": (marlin, 8), "humming-int5": (humming, 5), "humming-int6": (humming, 6)}


def measure(num_rows: int, num_inputs: int, index_bits: int, bandwidth: float, skipped: dict[str, str]) -> list[dict[str, Any]]:
    """One row per number of tokens."""
    copies = max(2, -(-(2 * torch.cuda.get_device_properties().L2_cache_size) // (num_rows * num_inputs * index_bits // 16)))
    weights = [random_weight(num_rows, num_inputs, index_bits, "cuda") for _ in range(copies)]
    plain = [torch.randn(num_rows, num_inputs, dtype=DTYPE, device="cuda") for _ in range(copies)]
    layers: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
        "bf16": [lambda x, w=w: torch.nn.functional.linear(x, w) for w in plain],
        **{name: [lambda x, w=w, multiply=multiply: multiply(x, w, None) for w in weights] for name, multiply in WAYS.items()},
    }
    for name, (make, bits) in REFERENCES.items():
        try:
            made = [make(num_rows, num_inputs, bits) for _ in range(copies)]
            made[0](torch.randn(1, num_inputs, dtype=DTYPE, device="cuda"))
            layers[name] = made
        except Exception as error:  # a reference that is not there, or fails in its own way, leaves the others to be measured
            skipped[name] = f"{type(error).__name__}: {error}"
    rows = []
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, num_inputs, dtype=DTYPE, device="cuda")
        # Packed, this would decode the weight once for every 64 tokens.
        timed = {name: microseconds([functools.partial(call, x) for call in calls]) for name, calls in layers.items()
                 if name != "packed" or num_tokens <= 512}
        read = weights[0].tiles.nbytes + 4 * num_rows + 2 * num_inputs + 2 * num_tokens * (num_rows + num_inputs)
        row = {"num_rows": num_rows, "num_inputs": num_inputs, "num_tokens": num_tokens, "copies": copies,
               **{f"{name}_us": median for name, (median, _) in timed.items()},
               **{f"{name}_spread_us": spread for name, (_, spread) in timed.items()}}
        way = "packed" if num_tokens <= triton_launch.gemm_max_tokens(x.device) and "packed" in timed else "dequantized"
        row |= {"served": way, "speed_up": row["bf16_us"] / row[f"{way}_us"],
                "of_copy_bandwidth": read / (row[f"{way}_us"] / 1e6) / bandwidth}
        print(f"{num_rows:6} x {num_inputs:5}, {num_tokens:5} tokens: " + ", ".join(f"{name} {us:.1f}" for name, (us, _) in timed.items())
              + f" us; {row['speed_up']:.2f}x bf16, {row['of_copy_bandwidth']:.0%} of a copy's bandwidth", flush=True)
        rows.append(row)
    return rows


def crossing(rows: list[dict[str, Any]]) -> int:
    """The most tokens up to which the packed way takes less time over all shapes."""
    best = 0
    for num_tokens in sorted({row["num_tokens"] for row in rows if "packed_us" in row}):
        ratios = [row["packed_us"] / row["dequantized_us"] for row in rows if row["num_tokens"] == num_tokens]
        if statistics.geometric_mean(ratios) > 1:
            break
        best = num_tokens
    return best


def plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for model in result["models"]:
        times: dict[int, list[float]] = {}
        for row in result["models"][model]:
            total = times.setdefault(row["num_tokens"], [0.0, 0.0])
            total[0] += row["bf16_us"]
            total[1] += row[f"{row['served']}_us"]
        axes.plot(list(times), [bf16 / ours for bf16, ours in times.values()], marker="o", label=model)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed over cuBLAS bf16, all linear layers of a decoder layer",
             title=f"{result['index_bits'] / 2:g} bits per weight, {result['environment']['gpu']}")
    axes.set_xticks(TOKENS, [str(m) for m in TOKENS], rotation=60)
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON to write")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--index-bits", type=int, default=11)
    parser.add_argument("--save-crossing", action="store_true", help="write the crossing of this GPU into the package's table")
    args = parser.parse_args()
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        if not INTERPRETED:
            sys.exit("no GPU: nothing to measure. TRITON_INTERPRET=1 runs the comparison with float64 alone.")
        check(96, 512, args.index_bits, (1, 9, 130), "cpu")
        print("no GPU: results agree with float64; no speed was measured")
        return
    for bits in {8, args.index_bits}:
        for num_rows, num_inputs in dict.fromkeys(shape for model in args.models for shape in SHAPES[model]):
            check(num_rows, num_inputs, bits, (1, 7, 16, 33, 128, 300), "cuda")
    bandwidth, skipped = copy_bandwidth(), {}
    result: dict[str, Any] = {"environment": environment(), "index_bits": args.index_bits, "copy_bytes_per_second": bandwidth}
    result["models"] = {model: [row for shape in SHAPES[model] for row in measure(*shape, args.index_bits, bandwidth, skipped)]
                        for model in args.models}
    rows = [row for model in args.models for row in result["models"][model]]
    result |= {"not_measured": skipped, "crossing": crossing(rows)}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, why in skipped.items():
        print(f"{name} was not measured: {why}")
    plot(result, args.out.with_suffix(".png"))
    if args.save_crossing:
        known = json.loads(triton_launch.CROSSINGS.read_text()) | {triton_launch.crossing_key(torch.device("cuda")): result["crossing"]}
        triton_launch.CROSSINGS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
