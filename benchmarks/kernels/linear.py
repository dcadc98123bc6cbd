"""Speed of the quantized linear layer against cuBLAS in bfloat16.

    python -m benchmarks.kernels.linear [OUT.json] [--models ...] [--index-bits 11]
                                        [--save-crossover]

Marlin and Humming are measured too, where vLLM and humming-kernels are installed.

First compares the results with float64, and reports no speed if one is wrong. Every time is a
median over CUDA graphs, with the rotation, over so many copies of the weight that the L2 cache
cannot hold them. OUT.json records the machine and the versions too, OUT.png plots the speeds.
Without a GPU and with TRITON_INTERPRET=1, only the comparison runs.
"""

import argparse
import functools
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernels.check import DTYPE, WAYS, check, random_weight
from benchmarks.kernels.peers import PEERS, Layer
from qamw_kernels.ops.crossover import (
    CROSSOVER_FILE,
    crossover_key,
    gemm_max_tokens,
    kernel_for_many,
)
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.launcher import ON_DEVICE
from qamw_kernels.ops.tiling import tiled_shape
from qamw_kernels.ops.weight import Rate

# (N, K) of the fused layers: q/k/v, output, gate/up, down.
SHAPES = {
    "llama-2-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "llama-2-13b": ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),
    # also Mistral-7B
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "qwen2.5-3b": ((2560, 2048), (2048, 2048), (22016, 2048), (2048, 11008)),
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 8192)
PACKED_MAX_TOKENS = 1024
"""Most tokens that are measured the packed way: it decodes the weight again for every 64 tokens, or
for every 256 with the wide kernel of Hopper."""
RESULTS = Path(__file__).with_name("results")


def output_of(*command: str) -> str:
    """What a command prints, or why it could not be run."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    smi = functools.partial(output_of, "nvidia-smi", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": smi("--query-gpu=driver_version"),
        "clocks": smi("--query-gpu=clocks.sm,clocks.mem,clocks.max.sm"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "command": sys.argv,
    }


def microseconds(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """Median and spread (from 10 % to 90 %) of one call, in a CUDA graph of all calls in turn."""

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


def make_layers(
    num_rows: int, num_inputs: int, index_bits: int, copies: int, skipped: dict[str, str]
) -> dict[str, list[Layer]]:
    """Copies of every layer to measure, by name; what fails is explained in ``skipped``."""
    plain = [torch.randn(num_rows, num_inputs, dtype=DTYPE, device="cuda") for _ in range(copies)]
    weights = [random_weight(num_rows, num_inputs, index_bits, "cuda") for _ in range(copies)]
    layers: dict[str, list[Layer]] = {
        "bf16": [lambda x, w=w: torch.nn.functional.linear(x, w) for w in plain]
    }
    for name, multiply in WAYS.items():
        layers[name] = [lambda x, w=w, multiply=multiply: multiply(x, w, None) for w in weights]
    for name, (make, bits) in PEERS.items():
        try:
            made = [make(num_rows, num_inputs, bits) for _ in range(copies)]
            made[0](torch.randn(1, num_inputs, dtype=DTYPE, device="cuda"))
            layers[name] = made
        except Exception as error:  # not installed, or fails in its own way: measure the others
            skipped[name] = f"{type(error).__name__}: {error}"
    return layers


def measure(
    num_rows: int, num_inputs: int, index_bits: int, bandwidth: float, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """One row per number of tokens."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    copies = max(2, -(-(2 * cache) // (num_rows * num_inputs * index_bits // 16)))
    layers = make_layers(num_rows, num_inputs, index_bits, copies, skipped)
    tiles_bytes = 4 * math.prod(tiled_shape(num_rows, num_inputs, index_bits))
    weight_bytes = tiles_bytes + 4 * num_rows + 2 * num_inputs
    rows = []
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, num_inputs, dtype=DTYPE, device="cuda")
        timed = {
            name: microseconds([functools.partial(call, x) for call in calls])
            for name, calls in layers.items()
            if name != "packed" or num_tokens <= PACKED_MAX_TOKENS
        }
        row: dict[str, Any] = {
            "num_rows": num_rows,
            "num_inputs": num_inputs,
            "num_tokens": num_tokens,
            "copies": copies,
            **{f"{name}_us": median for name, (median, _) in timed.items()},
            **{f"{name}_spread_us": spread for name, (_, spread) in timed.items()},
        }
        processor = ON_DEVICE.processor(x.device)
        most = gemm_max_tokens(x.device, x.dtype, Rate(index_bits), processor)
        few = num_tokens <= most and "packed" in timed
        way = "packed" if few else "dequantized"
        seconds = row[f"{way}_us"] / 1e6
        num_bytes = weight_bytes + 2 * num_tokens * (num_rows + num_inputs)
        row["served"] = way
        row["speed_up"] = row["bf16_us"] / row[f"{way}_us"]
        row["of_copy_bandwidth"] = num_bytes / seconds / bandwidth
        times = ", ".join(f"{name} {median:.1f}" for name, (median, _) in timed.items())
        print(
            f"{num_rows:6} x {num_inputs:5}, {num_tokens:5} tokens: {times} us; "
            f"{row['speed_up']:.2f}x bf16, {row['of_copy_bandwidth']:.0%} of a copy's bandwidth",
            flush=True,
        )
        rows.append(row)
    return rows


def crossover(rows: list[dict[str, Any]]) -> int:
    """The most tokens up to which the packed way takes less time over all shapes."""
    best = 0
    for num_tokens in sorted({row["num_tokens"] for row in rows if "packed_us" in row}):
        ratios = [
            row["packed_us"] / row["dequantized_us"]
            for row in rows
            if row["num_tokens"] == num_tokens
        ]
        if statistics.geometric_mean(ratios) > 1:
            break
        best = num_tokens
    return best


def plot(result: dict[str, Any], file: Path) -> None:
    """Speed of all linear layers of a decoder layer over the number of tokens, by model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for model in result["models"]:
        times: dict[int, list[float]] = {}
        for row in result["models"][model]:
            total = times.setdefault(row["num_tokens"], [0.0, 0.0])
            total[0] += row["bf16_us"]
            total[1] += row[f"{row['served']}_us"]
        speeds = [bf16 / ours for bf16, ours in times.values()]
        axes.plot(list(times), speeds, marker="o", label=model)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(
        xscale="log",
        xlabel="tokens",
        ylabel="speed over cuBLAS bf16, all linear layers of a decoder layer",
        title=f"{result['index_bits'] / 2:g} bits per weight, {result['environment']['gpu']}",
    )
    axes.set_xticks(TOKENS, [str(m) for m in TOKENS], rotation=60)
    axes.legend()
    figure.savefig(file, dpi=150)


def measure_all(models: list[str], index_bits: int) -> dict[str, Any]:
    """What OUT.json records."""
    bandwidth = copy_bandwidth()
    skipped: dict[str, str] = {}
    measured = {
        model: [
            row
            for shape in SHAPES[model]
            for row in measure(*shape, index_bits, bandwidth, skipped)
        ]
        for model in models
    }
    return {
        "environment": environment(),
        "index_bits": index_bits,
        "kernel_for_many": kernel_name(index_bits),
        "copy_bytes_per_second": bandwidth,
        "models": measured,
        "not_measured": skipped,
        "crossover": crossover([row for rows in measured.values() for row in rows]),
    }


def kernel_name(index_bits: int) -> str:
    """Name of the kernel of the packed product for more than a few tokens, on the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    return kernel_for_many(DTYPE, Rate(index_bits), ON_DEVICE.processor(device))


def save_crossover(tokens: int, index_bits: int) -> None:
    """Write the crossover of this GPU into the package's table."""
    known = json.loads(CROSSOVER_FILE.read_text())
    device = torch.device("cuda", torch.cuda.current_device())
    known[crossover_key(device, kernel_name(index_bits))] = tokens
    CROSSOVER_FILE.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        default=RESULTS / "linear.json",
        help="JSON to write (default: benchmarks/kernels/results/linear.json)",
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--index-bits", type=int, default=11)
    parser.add_argument(
        "--save-crossover",
        action="store_true",
        help="write the crossover of this GPU into the package's table",
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        if not interpreted():
            sys.exit(
                "no GPU: nothing to measure. "
                "TRITON_INTERPRET=1 runs the comparison with float64 alone."
            )
        check(96, 512, args.index_bits, (1, 9, 130), "cpu")
        print("no GPU: results agree with float64; no speed was measured")
        return
    shapes = dict.fromkeys(shape for model in args.models for shape in SHAPES[model])
    for bits in {8, args.index_bits}:
        for num_rows, num_inputs in shapes:
            check(num_rows, num_inputs, bits, (1, 7, 16, 33, 128, 300), "cuda")
    result = measure_all(args.models, args.index_bits)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, why in result["not_measured"].items():
        print(f"{name} was not measured: {why}")
    plot(result, args.out.with_suffix(".png"))
    if args.save_crossover:
        save_crossover(result["crossover"], args.index_bits)


if __name__ == "__main__":
    main()
