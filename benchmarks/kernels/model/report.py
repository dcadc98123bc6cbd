"""Rows and tables of the model; ``python -m benchmarks.kernels.model.report`` writes them."""

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import triton

from benchmarks.kernels.model.assumptions import GPUS, TYPICAL, Gpu, Machine, bf16_seconds
from benchmarks.kernels.model.kernels import decode_launch, rotate_launch
from benchmarks.kernels.model.simulate import Outcome, simulate

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHAPES = {  # of Llama-3-8B: rows, inputs
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
RATES = (11, 8)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)
PACKED_MAX_TOKENS = 128
ROTATION_BLOCK_SIZE = 128
INTRODUCTION = """\
# What a model of an H100 and an H200 says of the kernels

Written by `make kernels-model`, without a GPU: **modelled, not measured**. The compiled kernels are
replayed instruction by instruction on a model of the multiprocessors and their memory
(`benchmarks/kernels/model`, every assumption with its source in `assumptions.py`). bfloat16, the
layers of Llama-3-8B, rotation and gaps between launches included. A bf16 product takes 2.0 us and
its bytes at the speed of a copy, or its arithmetic at 650 TFLOP/s.
"""


@functools.cache
def _rotation(num_inputs: int, num_tokens: int, gpu: Gpu, machine: Machine) -> Outcome:
    launch = rotate_launch(num_inputs, num_tokens, ROTATION_BLOCK_SIZE, machine)
    return simulate(launch, gpu, machine)


def packed_seconds(
    shape: tuple[int, int], num_tokens: int, index_bits: int, gpu: Gpu, machine: Machine
) -> tuple[float, Outcome]:
    """Time of a packed product with its launches and its rotation, and what the GEMM does in it."""
    rotation = _rotation(shape[1], num_tokens, gpu, machine)
    launch = decode_launch(*shape, num_tokens, index_bits, machine)
    product = simulate(launch, gpu, machine)
    return 2 * machine.launch_gap + rotation.seconds + product.seconds, product


def decoded_seconds(
    shape: tuple[int, int], num_tokens: int, index_bits: int, gpu: Gpu, machine: Machine
) -> float:
    """Time of decoding into a workspace and a vendor's product; of the former only the traffic."""
    weights = shape[0] * shape[1]
    traffic = weights * (index_bits / 16 + 2)
    return machine.launch_gap + traffic / gpu.copy + bf16_seconds(*shape, num_tokens, gpu)


def row(
    name: str, num_tokens: int, index_bits: int, gpu: Gpu, machine: Machine = TYPICAL
) -> dict[str, Any]:
    """Figures of one product."""
    shape = SHAPES[name]
    found: dict[str, Any] = {"gpu": gpu.name, "b": index_bits, "shape": name, "M": num_tokens}
    if num_tokens <= PACKED_MAX_TOKENS:
        seconds, product = packed_seconds(shape, num_tokens, index_bits, gpu, machine)
        found["kernel_us"] = round(product.seconds * 1e6, 2)
        found["lsu"], found["issue"] = round(product.lsu, 2), round(product.issue, 2)
        found["x_hits"] = round(product.l1_hits, 2)
    else:
        seconds = decoded_seconds(shape, num_tokens, index_bits, gpu, machine)
    weight_bytes = shape[0] * shape[1] * index_bits / 16
    found["us"] = round(seconds * 1e6, 2)
    found["bf16_us"] = round(bf16_seconds(*shape, num_tokens, gpu) * 1e6, 2)
    found["bandwidth"] = round(weight_bytes / gpu.datasheet / seconds, 3)
    return found


def speed_up(rows: Iterable[dict[str, Any]]) -> float:
    """Of some products, one after the other, over bf16."""
    rows = list(rows)
    return float(sum(r["bf16_us"] for r in rows) / sum(r["us"] for r in rows))


def rows() -> Iterator[dict[str, Any]]:
    """Figures of every product."""
    for gpu in GPUS:
        for bits in RATES:
            for tokens in TOKENS:
                layer = [row(name, tokens, bits, gpu) for name in SHAPES]
                print(f"{gpu.name}, b = {bits}, M = {tokens}: {speed_up(layer):.2f}x", flush=True)
                yield from layer


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for every GPU and rate."""
    lines = [INTRODUCTION, f"Kernels compiled by Triton {triton.__version__}.", ""]
    for gpu in GPUS:
        for bits in RATES:
            lines += [
                f"## {gpu.name}, b = {bits}: modelled, not measured",
                "",
                f"Per cent of the datasheet's bandwidth ({gpu.datasheet / 1e12} TB/s) for each",
                "layer, and the speed-up of all four over bf16.",
                "",
                f"| M | {' | '.join(SHAPES)} | over bf16 |",
                "|---" * (len(SHAPES) + 2) + "|",
            ]
            for tokens in TOKENS:
                key = {"gpu": gpu.name, "b": bits, "M": tokens}
                layer = [r for r in found if key.items() <= r.items()]
                cells = [f"{r['bandwidth']:.0%}" for r in layer]
                lines.append(f"| {tokens} | {' | '.join(cells)} | {speed_up(layer):.2f}x |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    found = list(rows())
    data = {"triton": triton.__version__, "modelled": True, "rows": found}
    text = json.dumps(data).replace('{"gpu"', '\n{"gpu"')
    (RESULTS / "model.json").write_text(text + "\n")
    (RESULTS / "model.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
