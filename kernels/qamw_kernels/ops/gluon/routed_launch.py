"""Launcher of the Gluon kernels for mixtures of experts."""

from typing import Any

import torch

from qamw_kernels.ops.gluon import narrow_launch, table
from qamw_kernels.ops.launcher import Launcher, Processor, cdiv
from qamw_kernels.ops.routing import Routing
from qamw_kernels.ops.tiling import TILE_INPUTS
from qamw_kernels.ops.weight import TiledWeight

narrow_kernel: Any = None
"""The kernel for blocks of 8 slots, where the installed Triton can compile it."""
if table.HAS_GATHER:
    from qamw_kernels.ops.gluon.routed_kernels import routed_narrow_gemm_kernel as narrow_kernel

NARROW_SLOTS = narrow_launch.MAX_TOKENS
BLOCK_SIZES = (NARROW_SLOTS,)
MAX_AVERAGE = 16


def block_size(num_slots: int, num_experts: int) -> int:
    """Slots of a block; 0: leave it to the plain kernel, which is quicker than many such blocks."""
    return NARROW_SLOTS if num_slots <= MAX_AVERAGE * num_experts else 0


def fits(
    block_size: int,
    num_inputs: int,
    dtype: torch.dtype,
    index_bits: int,
    processor: Processor | None,
) -> bool:
    """Whether there is a kernel for blocks of this size and so many inputs.

    Args:
        dtype: of the activations.
        processor: None for one that runs no compiled kernels.
    """
    if block_size != NARROW_SLOTS or processor is None:
        return False
    early = narrow_launch.begins_early(processor)
    return early and narrow_launch.fits(NARROW_SLOTS, num_inputs, dtype, index_bits, processor)


def row_tiles_at_once(num_inputs: int) -> int:
    """Row tiles that have warps of their own, one for every half tile along the inputs."""
    return max(narrow_launch.WARPS // cdiv(num_inputs, TILE_INPUTS // 2), 1)


def gemm(
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
    fixed = narrow_launch.constants(weight.index_bits, rotated.dtype, processor)
    turns = len(routing.experts) * cdiv(num_row_tiles, at_once)
    launcher.launch(
        narrow_kernel,
        (min(processor.multiprocessors, turns),),
        rotated.view(torch.int32),
        weight.tiles,
        weight.row_norms,
        weight.quadrant_words,
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
