"""Launcher of the Gluon kernel that decodes a weight into a matrix.

It needs compute capability 9.0, and a Triton that can compile the kernel: 3.7.1 or newer.
"""

import functools
from typing import Any

import torch

from qamw_kernels.ops.gluon import table, wide_launch
from qamw_kernels.ops.launcher import TL_DTYPES, Launcher, Processor, cdiv
from qamw_kernels.ops.tiling import TILE_ROWS
from qamw_kernels.ops.weight import Rate, TiledWeight

WIDTH = 128  # outputs that a warp has at once
WARPS = 16
kernels = wide_launch.load("dequantize_kernels")


def fits(
    dtype: torch.dtype, rate: Rate, rotation_block_size: int, processor: Processor | None
) -> bool:
    """Whether the kernel can decode weights of these rates and rotations on a processor."""
    if kernels is None or processor is None or processor.compute_capability != 90:
        return False
    needed = table.table_bytes(rate, processor.shared_memory) + 2 * WIDTH**2
    room = dtype in table.DTYPES and needed < processor.shared_memory
    return room and rotation_block_size <= WIDTH


@functools.cache
def constants(
    rate: Rate, rotation_block_size: int, dtype: torch.dtype, shared_memory: int
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and options of its compiler.

    Args:
        shared_memory: bytes that one program may have.
    """
    return {
        **table.rate_constants(rate, shared_memory),
        "B": rotation_block_size,
        "WIDTH": WIDTH,
        "DTYPE": TL_DTYPES[dtype],
        "WARPS": WARPS,
        "num_warps": WARPS,
        "maxnreg": table.registers(WARPS),
    }


def dequantize(
    weight: TiledWeight, out: torch.Tensor, processor: Processor, launcher: Launcher
) -> None:
    """Launch the kernel: out [N, K] = the weight, in the basis of the unrotated input."""
    assert kernels is not None
    row_blocks = cdiv(weight.num_rows, TILE_ROWS * WARPS)
    size = weight.rotation_block_size
    launcher.launch(
        kernels.dequantize_kernel,
        (min(row_blocks * weight.tiles.shape[1], processor.multiprocessors),),
        weight.tiles,
        weight.row_norms,
        weight.input_scales,
        weight.entry_words,
        out,
        weight.num_rows,
        weight.num_inputs,
        **constants(weight.rate, size, out.dtype, processor.shared_memory),
    )
