"""Rows and tables of the model.

``python -m benchmarks.kernels.model.report [TOKENS ...]`` writes them.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernels.model import mixtures
from benchmarks.kernels.model.assumptions import GPUS, TYPICAL, Gpu, Machine, bf16_seconds
from benchmarks.kernels.model.blocks import PROCESSOR
from benchmarks.kernels.model.narrow import narrow_launch
from benchmarks.kernels.model.rotation import rotate_launch
from benchmarks.kernels.model.simulate import Launch, Outcome, simulate
from benchmarks.kernels.model.wide import adding_launch, wide_launch
from qamw_kernels.format.codebook import TRELLIS
from qamw_kernels.ops.gluon import narrow_launch as narrow
from qamw_kernels.ops.gluon import wide_launch as wide
from qamw_kernels.ops.weight import Rate

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHAPES = {  # of Llama-3-8B: rows, inputs
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
RATES = (Rate(11), Rate(11, TRELLIS), Rate(8))
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
ROTATION_BLOCK_SIZE = 128
INTRODUCTION = f"""\
# What a model of an H100 and an H200 says about the kernels

Written by `make kernels-model`, without a GPU: **modeled, not measured**. The compiled kernels are
replayed instruction by instruction on a model of the multiprocessors and their memory
(`benchmarks/kernels/model`; `assumptions.py` has every assumption with its source). The figures are
for bfloat16 and the layers of Llama-3-8B; rotation and gaps between launches are included. The
time of a bf16 product is 2.0 us plus the time to copy its bytes, or to do its arithmetic at
650 TFLOP/s, whichever is longer. docs/kernels.md compares the model with measurements on an H100
(`h100.json`).

For more than {wide.MAX_TOKENS} tokens, weights are decoded into a workspace. Only the memory
traffic of decoding is counted here, so those figures are too good.
"""


@functools.cache
def _rotation(num_inputs: int, num_tokens: int, gpu: Gpu, machine: Machine, swapped: bool) -> float:
    launch = rotate_launch(num_inputs, num_tokens, ROTATION_BLOCK_SIZE, machine, swapped)
    return simulate(launch, gpu, machine).seconds


def _narrow(num_inputs: int, num_tokens: int, rate: Rate) -> bool:
    return narrow.fits(num_tokens, num_inputs, torch.bfloat16, rate, PROCESSOR)


def packed_launch(shape: tuple[int, int], num_tokens: int, rate: Rate, machine: Machine) -> Launch:
    """The launch of the kernel that multiplies so many tokens."""
    make = narrow_launch if _narrow(shape[1], num_tokens, rate) else wide_launch
    return make(*shape, num_tokens, rate, machine)


def packed_seconds(
    shape: tuple[int, int], num_tokens: int, rate: Rate, gpu: Gpu, machine: Machine
) -> tuple[float, Outcome]:
    """Time of a packed product with its launches and its rotation, and what the GEMM does in it."""
    launch = packed_launch(shape, num_tokens, rate, machine)
    is_narrow = _narrow(shape[1], num_tokens, rate)
    rotation = _rotation(shape[1], num_tokens, gpu, machine, swapped=not is_narrow)
    if is_narrow:
        launch.ready = rotation + machine.dependent_end - machine.dependent_start
        product = simulate(launch, gpu, machine)
        return machine.launch_gap + machine.dependent_start + product.seconds, product
    # A multiprocessor has no room for programs of two of these kernels at the same time, so the
    # kernels follow each other, but without a gap.
    product = simulate(launch, gpu, machine)
    seconds = machine.launch_gap + rotation + product.seconds
    adding = adding_launch(*shape, num_tokens, rate, machine)
    return seconds + (simulate(adding, gpu, machine).seconds if adding else 0), product


def decoded_seconds(
    shape: tuple[int, int], num_tokens: int, rate: Rate, gpu: Gpu, machine: Machine
) -> float:
    """Time of decoding into a workspace and a vendor's product; of the former only the traffic."""
    weights = shape[0] * shape[1]
    traffic = weights * (rate.index_bits / 16 + 2)
    return machine.launch_gap + traffic / gpu.copy + bf16_seconds(*shape, num_tokens, gpu)


def row(
    name: str, num_tokens: int, rate: Rate, gpu: Gpu, machine: Machine = TYPICAL
) -> dict[str, Any]:
    """Figures of one product."""
    shape = SHAPES[name]
    found: dict[str, Any] = {
        "gpu": gpu.name,
        "b": rate.index_bits,
        "code": rate.code,
        "shape": name,
        "M": num_tokens,
    }
    if num_tokens <= wide.MAX_TOKENS:
        seconds, product = packed_seconds(shape, num_tokens, rate, gpu, machine)
        found["kernel_us"] = round(product.seconds * 1e6, 2)
        found["lsu"], found["issue"] = round(product.lsu, 2), round(product.issue, 2)
        found["x_hits"] = round(product.l1_hits, 2)
    else:
        seconds = decoded_seconds(shape, num_tokens, rate, gpu, machine)
    weight_bytes = shape[0] * shape[1] * rate.index_bits / 16
    found["us"] = round(seconds * 1e6, 2)
    found["bf16_us"] = round(bf16_seconds(*shape, num_tokens, gpu) * 1e6, 2)
    found["bandwidth"] = round(weight_bytes / gpu.datasheet / seconds, 3)
    return found


def speed_up(rows: Iterable[dict[str, Any]]) -> float:
    """Speed-up over bf16 of some products, one after the other."""
    rows = list(rows)
    return float(sum(r["bf16_us"] for r in rows) / sum(r["us"] for r in rows))


def rows(all_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Figures of every product."""
    keys = [
        (name, tokens, rate, gpu)
        for tokens in all_tokens
        for gpu in GPUS
        for rate in RATES
        for name in SHAPES
    ]
    # Everything is compiled before, by one thread: those of `replay` may want the same kernel.
    for name, tokens, rate, _ in keys:
        if tokens <= wide.MAX_TOKENS:
            packed_launch(SHAPES[name], tokens, rate, TYPICAL)
    return replay(row, keys)


def replay(make: Callable[..., dict[str, Any]], keys: Sequence[Any]) -> list[dict[str, Any]]:
    """``make`` of all keys, printed as they come; every core runs a simulator."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = []
        for made in pool.map(lambda key: make(*key), keys):
            print(made, flush=True)
            found.append(made)
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for every GPU and rate."""
    lines = [INTRODUCTION, f"Kernels compiled by Triton {triton.__version__}.", ""]
    for gpu in GPUS:
        for rate in RATES:
            lines += [
                f"## {gpu.name}, b = {rate.index_bits}, {rate.code} code: modeled, not measured",
                "",
                f"Percent of the datasheet's bandwidth ({gpu.datasheet / 1e12} TB/s) for each",
                "layer, and the speed-up of all four over bf16.",
                "",
                f"| M | {' | '.join(SHAPES)} | over bf16 |",
                "|---" * (len(SHAPES) + 2) + "|",
            ]
            for tokens in dict.fromkeys(r["M"] for r in found):
                key = {"gpu": gpu.name, "b": rate.index_bits, "code": rate.code, "M": tokens}
                layer = [r for r in found if key.items() <= r.items()]
                cells = [f"{r['bandwidth']:.0%}" for r in layer]
                lines.append(f"| {tokens} | {' | '.join(cells)} | {speed_up(layer):.2f}x |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    found = rows([int(argument) for argument in sys.argv[1:]] or TOKENS)
    mixtures.compile_all()
    experts = replay(mixtures.row, mixtures.KEYS)
    data = {"triton": triton.__version__, "modeled": True, "rows": found, "experts": experts}
    text = json.dumps(data).replace('{"gpu"', '\n{"gpu"')
    (RESULTS / "model.json").write_text(text + "\n")
    (RESULTS / "model.md").write_text(markdown(found) + mixtures.markdown(experts))


if __name__ == "__main__":
    main()
