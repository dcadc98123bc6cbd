"""Launcher of the Gluon kernel for what neither the narrow nor the wide one takes."""

import functools
from typing import Any

import torch

from qamw_kernels.ops.gluon import table
from qamw_kernels.ops.launcher import TL_DTYPES, Launcher, Processor, cdiv
from qamw_kernels.ops.weight import Rate, TiledWeight

WARP_BASES = ((128,), (256,), (512,))  # a warp has 128 of the words that a program loads at once
WARPS = 1 << len(WARP_BASES)
PARTS = (2, 4, 8)  # of 8 tokens each, that one program may have

kernel: Any = None
"""The kernel, where the installed Triton can compile it."""
if table.HAS_GATHER:
    from qamw_kernels.ops.gluon.decode_kernels import decode_gemm_kernel as kernel


def shared_bytes(rate: Rate, shared_memory: int) -> int:
    """What a program takes of ``shared_memory``: the table, and room to add the warps' sums."""
    return table.table_bytes(rate, shared_memory) + 512 * WARPS


def parts_of(num_tokens: int) -> int:
    """Parts of 8 tokens that one program holds."""
    return next((parts for parts in PARTS if num_tokens <= 8 * parts), PARTS[-1])


def programs_per_processor(rate: Rate, parts: int, shared_memory: int) -> int:
    """Programs that a multiprocessor with ``shared_memory`` bytes runs at once.

    It has registers for only one program with the sums of 64 tokens.
    """
    if parts == PARTS[-1]:
        return 1
    return max(1, min(2, shared_memory // shared_bytes(rate, shared_memory)))


@functools.cache
def log_row_tiles(num_row_tiles: int, num_input_tiles: int, programs: int) -> int:
    """Log2 of the row tiles that share the warps of a program.

    Chosen so that the busiest program has the fewest rounds of its loop: with one row tile, some
    warps are idle in the last round if their number does not divide that of the tiles along the
    inputs.
    """

    def rounds(log: int) -> int:
        runs = cdiv(cdiv(num_row_tiles, 1 << log), programs)
        turns = cdiv(num_input_tiles, WARPS >> log)
        return runs * turns

    return min(range(len(WARP_BASES) + 1), key=rounds)


@functools.cache
def constants(
    rate: Rate,
    dtype: torch.dtype,
    parts: int,
    shared_memory: int,
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and options of its compiler.

    Args:
        shared_memory: bytes that a multiprocessor has.
    """
    programs = programs_per_processor(rate, parts, shared_memory)
    return {
        **table.rate_constants(rate, shared_memory),
        "DTYPE": TL_DTYPES[dtype],
        "PARTS": parts,
        "WARPS": WARPS,
        "WARP_BASES": WARP_BASES,
        "num_warps": WARPS,
        "maxnreg": table.registers(WARPS * programs),
    }


def fits(
    num_tokens: int,
    num_inputs: int,
    dtype: torch.dtype,
    rate: Rate,
    processor: Processor | None,
) -> bool:
    """Whether the kernel runs on a processor, with any number of inputs and M * N < 2**31."""
    if processor is None or not table.fits(dtype, rate, processor):
        return False
    return shared_bytes(rate, processor.shared_memory) <= processor.shared_memory


def gemm(
    rotated: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    processor: Processor,
    launcher: Launcher,
) -> None:
    """Launch the kernel: y [M, N] = rotated [M, K] times the packed weight, plus ``bias`` [N]."""
    num_tokens, num_inputs = rotated.shape
    parts, shared_memory = parts_of(num_tokens), processor.shared_memory
    programs = programs_per_processor(weight.rate, parts, shared_memory)
    programs *= processor.multiprocessors
    num_row_tiles, num_input_tiles = weight.tiles.shape[:2]
    log = log_row_tiles(num_row_tiles, num_input_tiles, programs)
    grid = (
        min(cdiv(num_row_tiles, 1 << log), programs),
        cdiv(num_tokens, 8 * parts),
    )
    launcher.launch(
        kernel,
        grid,
        rotated.view(torch.int32),
        weight.tiles,
        weight.row_norms,
        weight.entry_words,
        y if bias is None else bias,
        y,
        num_tokens,
        weight.num_rows,
        num_inputs,
        int(bias is not None),
        log,
        **constants(weight.rate, rotated.dtype, parts, shared_memory),
    )
