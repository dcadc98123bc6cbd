"""Launcher of the Gluon kernels for mixtures of experts."""

from typing import Any

import torch
import triton

from qamw_kernels.ops.gluon import narrow_launch, table
from qamw_kernels.ops.launcher import Launcher, Processor
from qamw_kernels.ops.routing import Routing
from qamw_kernels.ops.weight import TiledWeight

narrow_kernel: Any = None
"""The kernel for blocks of 8 slots, where the installed Triton can compile it."""
if table.HAS_GATHER:
    from qamw_kernels.ops.gluon.routed_kernels import routed_narrow_gemm_kernel as narrow_kernel

NARROW_SLOTS = narrow_launch.MAX_TOKENS


def gemm_narrow(
    rotated: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    y: torch.Tensor,
    processor: Processor,
    launcher: Launcher,
) -> None:
    """Launch the kernel: rows of y [slots, N] of experts that are here; blocks have 8 slots."""
    num_inputs, num_row_tiles = weight.num_inputs, weight.tiles.shape[1]
    at_once = narrow_launch.row_tiles_at_once(num_inputs)
    fixed = narrow_launch.constants(weight.index_bits, rotated.dtype, processor)
    turns: int = len(routing.experts) * triton.cdiv(num_row_tiles, at_once)
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
        narrow_launch.batch(num_inputs, fixed["SLOTS"]),
        **fixed,
    )
