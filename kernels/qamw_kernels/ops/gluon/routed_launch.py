"""Launchers of the Gluon kernels for mixtures of experts.

A block has as many slots as a program of the kernel has tokens: 8 for the narrow kernel, which runs
on compute capability 9.0 and newer, more for the wide kernel, which runs on 9.0.
"""

from typing import Any

import torch

from qamw_kernels.ops.gluon import narrow_launch, table, wide_launch
from qamw_kernels.ops.launcher import Launcher, Processor, cdiv
from qamw_kernels.ops.routing import Routing
from qamw_kernels.ops.tiling import TILE_INPUTS
from qamw_kernels.ops.weight import Rate, TiledWeight

narrow_kernel: Any = None
"""The kernel for blocks of 8 slots, where the installed Triton can compile it."""
if table.HAS_GATHER:
    from qamw_kernels.ops.gluon.routed_kernels import routed_narrow_gemm_kernel as narrow_kernel

wide_kernels = wide_launch.load("routed_wide_kernels")

NARROW_SLOTS = narrow_launch.MAX_TOKENS
WIDE_SLOTS = (16, 32, 64, 128)
BLOCK_SIZES = (NARROW_SLOTS, *WIDE_SLOTS)
MAX_AVERAGE = {8: 4, 16: 10, 32: 24, 64: 60}
"""Block size -> average slots per expert up to which it is the fastest, by the model of an H100
and if all experts are equally likely. A second block of an expert costs as much as the first, so
only few experts should have one; but blocks of 128 slots cost 1.5 times as much as those of 64."""
NARROW_MAX_AVERAGE = 16
"""The same for the narrow kernel where the plain one is the other choice."""


def sizes_for(num_slots: int, num_experts: int) -> list[int]:
    """Block sizes to try, the best first; if none of them fits, the plain kernel runs."""
    average = num_slots / num_experts
    best = next((s for s, most in MAX_AVERAGE.items() if average <= most), WIDE_SLOTS[-1])
    narrow = [NARROW_SLOTS] if average <= NARROW_MAX_AVERAGE else []
    return [best, WIDE_SLOTS[0], *narrow]


def is_wide(block_size: int) -> bool:
    """Whether blocks of this size are for the wide kernel, which is given sorted tokens."""
    return block_size > NARROW_SLOTS


def fits(
    block_size: int,
    num_inputs: int,
    dtype: torch.dtype,
    rate: Rate,
    processor: Processor | None,
) -> bool:
    """Whether there is a kernel for blocks of this size and so many inputs.

    Args:
        dtype: of the activations.
        processor: None for one that runs no compiled kernels.
    """
    if block_size not in BLOCK_SIZES or processor is None:
        return False
    if is_wide(block_size):
        return wide_launch.fits(block_size, num_inputs, dtype, rate, processor)
    early = narrow_launch.begins_early(processor)
    return early and narrow_launch.fits(NARROW_SLOTS, num_inputs, dtype, rate, processor)


def row_tiles_at_once(num_inputs: int) -> int:
    """Row tiles that a program multiplies at once, with a warp for every half tile of each."""
    return max(narrow_launch.WARPS // cdiv(num_inputs, TILE_INPUTS // 2), 1)


def narrow_gemm(
    rotated: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    y: torch.Tensor,
    processor: Processor,
    launcher: Launcher,
) -> None:
    """Launch the kernel for blocks of 8 slots: the rows of y [slots, N] whose experts are here.

    Args:
        rotated: [tokens, K]; the number of slots is a multiple of that of tokens.
    """
    num_inputs, (num_row_tiles, num_input_tiles) = weight.num_inputs, weight.tiles.shape[1:3]
    at_once = row_tiles_at_once(num_inputs)
    fixed = narrow_launch.constants(weight.rate, rotated.dtype, processor)
    turns = len(routing.experts) * cdiv(num_row_tiles, at_once)
    launcher.launch(
        narrow_kernel,
        (min(processor.multiprocessors, turns),),
        rotated.view(torch.int32),
        weight.tiles,
        weight.row_norms,
        weight.entry_words,
        routing.slots,
        routing.experts,
        routing.num_sorted,
        y,
        len(y),
        len(y) // len(rotated),
        weight.num_rows,
        num_inputs,
        at_once,
        fixed["SLOTS"] // narrow_launch.slices(num_input_tiles) * at_once,
        **fixed,
    )


def wide_gemm(
    rotated: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    y: torch.Tensor,
    processor: Processor,
    launcher: Launcher,
) -> None:
    """Launch the kernel for larger blocks: the rows of y [slots, N] whose experts are here.

    Args:
        rotated: [sorted slots, K], swapped; see :mod:`qamw_kernels.ops.gluon.routed_wide_kernels`.
    """
    assert wide_kernels is not None
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    size, rate, memory = routing.block_size, weight.rate, processor.shared_memory
    shape = wide_launch.shape_of(rate, size, memory)
    block_shape = (size, shape.block_inputs)
    layout = wide_launch.descriptor_layout(block_shape, rotated.dtype)
    runs = len(routing.experts) * cdiv(weight.num_rows, shape.rows)
    launcher.launch(
        wide_kernels.routed_wide_gemm_kernel,
        (min(shape.tile.programs * processor.multiprocessors, runs),),
        weight.tiles,
        TensorDescriptor.from_tensor(rotated, list(block_shape), layout),
        weight.row_norms,
        weight.entry_words,
        routing.slots,
        routing.experts,
        routing.num_sorted,
        y,
        len(y),
        weight.num_rows,
        weight.num_inputs,
        **wide_launch.constants(rate, rotated.dtype, size, memory),
    )
