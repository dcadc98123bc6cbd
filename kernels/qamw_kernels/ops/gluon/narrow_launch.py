"""Launcher of the Gluon kernel for up to 8 tokens."""

import functools
from typing import Any

import torch

from qamw_kernels.ops.gluon import table
from qamw_kernels.ops.launcher import TL_DTYPES, Launcher, Processor, cdiv
from qamw_kernels.ops.tiling import TILE_INPUTS
from qamw_kernels.ops.weight import Rate, TiledWeight

kernel: Any = None
"""The kernel, where the installed Triton can compile it."""
if table.HAS_GATHER:
    from qamw_kernels.ops.gluon.narrow_kernels import narrow_gemm_kernel as kernel

MAX_TOKENS = 8
WARP_BASES = ((128,), (256,), (512,), (1024,))
WARPS = 1 << len(WARP_BASES)
SLICE_TILES = WARPS // 2  # a warp has half a tile of a slice
SLOT_BYTES = 512 * WARPS
MAX_SLOTS = 8


def slots(rate: Rate, shared_memory: int) -> int:
    """How many slots, each for the sums of one turn, fit beside the table: a power of two, or 0."""
    left = (shared_memory - table.table_bytes(rate, shared_memory)) // SLOT_BYTES
    return min(MAX_SLOTS, 1 << (left.bit_length() - 1)) if left > 0 else 0


def slices(num_input_tiles: int) -> int:
    """Number of parts of the inputs that all warps together multiply one after the other."""
    return cdiv(num_input_tiles, SLICE_TILES)


def begins_early(processor: Processor) -> bool:
    """Whether the kernel begins before the rotation is complete (a dependent launch).

    Such processors can also prefetch whole tiles.
    """
    return processor.compute_capability >= 90


@functools.cache
def constants(rate: Rate, dtype: torch.dtype, processor: Processor) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and options of its compiler."""
    early = begins_early(processor)
    return {
        **table.rate_constants(rate, processor.shared_memory),
        "DTYPE": TL_DTYPES[dtype],
        "WARPS": WARPS,
        "WARP_BASES": WARP_BASES,
        "SLOTS": slots(rate, processor.shared_memory),
        "PREFETCH": early,
        "DEPENDENT": early,
        "num_warps": WARPS,
        "maxnreg": table.registers(WARPS),
        "launch_pdl": early,
    }


def fits(
    num_tokens: int,
    num_inputs: int,
    dtype: torch.dtype,
    rate: Rate,
    processor: Processor | None,
) -> bool:
    """Whether the kernel can multiply so many tokens with so many inputs on a processor."""
    if num_tokens > MAX_TOKENS or processor is None or not table.fits(dtype, rate, processor):
        return False
    needed = slices(cdiv(num_inputs, TILE_INPUTS))
    return needed <= slots(rate, processor.shared_memory)


def gemm(
    rotated: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    processor: Processor,
    launcher: Launcher,
) -> None:
    """Launch the kernel: y [M, N] = rotated [M, K] times the packed weight, plus ``bias`` [N]."""
    num_row_tiles, num_input_tiles = weight.tiles.shape[:2]
    run = cdiv(num_row_tiles, processor.multiprocessors)
    fixed = constants(weight.rate, rotated.dtype, processor)
    launcher.launch(
        kernel,
        (cdiv(num_row_tiles, run),),
        rotated.view(torch.int32),
        weight.tiles,
        weight.row_norms,
        weight.entry_words,
        y if bias is None else bias,
        y,
        len(rotated),
        weight.num_rows,
        rotated.shape[1],
        int(bias is not None),
        run,
        fixed["SLOTS"] // slices(num_input_tiles),
        **fixed,
    )
