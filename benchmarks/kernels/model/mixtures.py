"""Rows and tables of the model for mixtures of experts."""

import functools
from collections.abc import Sequence
from typing import Any

from benchmarks.kernels.mixture import MIXTURES
from benchmarks.kernels.model.assumptions import GPUS, TYPICAL, Gpu, Machine
from benchmarks.kernels.model.experts import (
    bf16_grouped_seconds,
    routed_narrow_launch,
    simulate_part,
    slots_of_experts,
)
from benchmarks.kernels.model.rotation import rotate_launch, rotate_many_launch
from benchmarks.kernels.model.simulate import Launch, simulate
from benchmarks.kernels.model.wide import routed_wide_launch
from qamw_kernels.ops.gluon import routed_launch
from qamw_kernels.ops.weight import Rate

MIXTURE = MIXTURES["qwen3-30b-a3b"]
RATE = Rate(11)
ROTATION_BLOCK_SIZE = 128
TOKENS = (1, 8, 32, 128, 512, 2048)
KEYS = [(name, tokens, gpu) for tokens in TOKENS for gpu in GPUS for name in MIXTURE.shapes]
INTRODUCTION = f"""\
## Mixtures of experts, b = {RATE.index_bits}: modeled, not measured

Qwen3-30B-A3B: every token is sent to {MIXTURE.top_k} of {MIXTURE.experts} experts, all equally
likely. Gate and up are one product, down is another; rotations and gaps between launches
are included, routing and the activation between the products are not. The reference is a grouped
product in bf16 that reads every expert that has tokens once, at the speed of a copy, plus 2.0 us.
Of large launches, only one twelfth is replayed, on one twelfth of the GPU.
"""


@functools.cache
def _rotation(
    num_inputs: int, num_tokens: int, by_expert: bool, gpu: Gpu, machine: Machine
) -> float:
    make = rotate_launch
    if by_expert:
        make = functools.partial(rotate_many_launch, by_expert=True)
    return simulate(
        make(num_inputs, num_tokens, ROTATION_BLOCK_SIZE, machine), gpu, machine
    ).seconds


def product(
    shape: tuple[int, int], slots: Sequence[int], num_rows_of_x: int, machine: Machine
) -> tuple[Launch, int]:
    """The kernel that the launcher chooses, and how many tokens are rotated for it."""
    size = routed_launch.sizes_for(sum(slots), len(slots))[0]
    if not routed_launch.is_wide(size):
        launch = routed_narrow_launch(shape, slots, num_rows_of_x, RATE, machine)
        return launch, num_rows_of_x
    launch = routed_wide_launch(shape, slots, size, RATE, machine)
    return launch, sum(-(-n // size) * size for n in slots)


def row(name: str, num_tokens: int, gpu: Gpu, machine: Machine = TYPICAL) -> dict[str, Any]:
    """Figures of one product of all experts."""
    shape, slots = MIXTURE.shapes[name], slots_of_experts(MIXTURE, num_tokens)
    rows_of_x = num_tokens * (1 if name == "w13" else MIXTURE.top_k)
    launch, rotated = product(shape, slots, rows_of_x, machine)
    is_wide = routed_launch.is_wide(launch.tokens)
    rotation = _rotation(shape[1], rotated, is_wide, gpu, machine)
    if not is_wide:
        launch.ready = rotation + machine.dependent_end - machine.dependent_start
    found = simulate_part(launch, gpu, machine)
    # As in report.packed_seconds: programs of the wide kernel have no room beside the rotation's.
    seconds = machine.launch_gap + (rotation if is_wide else machine.dependent_start)
    seconds += found.seconds
    hit = sum(map(bool, slots))
    reference = bf16_grouped_seconds(shape, slots, rows_of_x, gpu)
    packed_bytes = hit * shape[0] * shape[1] * RATE.index_bits / 16
    return {
        "gpu": gpu.name,
        "b": RATE.index_bits,
        "shape": name,
        "M": num_tokens,
        "experts": hit,
        "kernel_us": round(found.seconds * 1e6, 2),
        "issue": round(found.issue, 2),
        "us": round(seconds * 1e6, 2),
        "bf16_us": round(reference * 1e6, 2),
        "bandwidth": round(packed_bytes / gpu.datasheet / seconds, 3),
    }


def compile_all() -> None:
    """Compile everything that the rows replay, in one thread."""
    for name, num_tokens, _ in KEYS:
        shape, slots = MIXTURE.shapes[name], slots_of_experts(MIXTURE, num_tokens)
        product(shape, slots, num_tokens, TYPICAL)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """A table for every GPU."""
    lines = [INTRODUCTION]
    for gpu in GPUS:
        names = " | ".join(MIXTURE.shapes)
        lines += [
            f"{gpu.name}: percent of the datasheet's bandwidth ({gpu.datasheet / 1e12} TB/s).",
            "",
            f"| M | experts hit | {names} | over bf16 |",
            "|---" * (len(MIXTURE.shapes) + 3) + "|",
        ]
        for tokens in dict.fromkeys(r["M"] for r in found):
            both = [r for r in found if r["gpu"] == gpu.name and r["M"] == tokens]
            cells = " | ".join(f"{r['bandwidth']:.0%}" for r in both)
            gain = sum(r["bf16_us"] for r in both) / sum(r["us"] for r in both)
            lines.append(f"| {tokens} | {both[0]['experts']} | {cells} | {gain:.2f}x |")
        lines.append("")
    return "\n".join(lines)
