"""Launcher of the Gluon kernel.

It needs shared-memory gather in the installed Triton, from 3.7.1 on.
"""

import functools
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from qamw_kernels.ops.launcher import Launcher, Processor
from qamw_kernels.ops.weight import TiledWeight

GLUON_DTYPES = (torch.bfloat16, torch.float16)
WARP_BASES = ((128,), (256,), (512,))  # a warp has 128 of the words that a program loads at once
WARPS = 1 << len(WARP_BASES)
PARTS = (2, 4, 8)  # of 8 tokens, by one program; narrow_launch has the kernel for one part

REGISTERS = {1: 255, 2: 128}
"""That a thread may have, by programs on a multiprocessor; left to itself, the compiler would use
fewer and spill others."""


def _load_kernels() -> ModuleType | None:
    """:mod:`qamw_kernels.ops.gluon.kernels`, where it can be compiled.

    None with an older Triton, or in the interpreter, which does not know Gluon.
    """
    if triton.knobs.runtime.interpret:
        return None
    try:
        from triton.experimental.gluon.language import shared_memory_descriptor
    except ImportError:
        return None
    if not hasattr(shared_memory_descriptor, "gather"):
        return None
    from qamw_kernels.ops.gluon import kernels as gluon_kernels

    return gluon_kernels


kernels = _load_kernels()


def shared_bytes(index_bits: int) -> int:
    """Shared memory of a program: the table, and room to add the sums of the warps."""
    return (128 << (index_bits - 2)) + 512 * WARPS


def parts_of(num_tokens: int) -> int:
    """Parts of 8 tokens that one program holds."""
    return next((parts for parts in PARTS if num_tokens <= 8 * parts), PARTS[-1])


def programs_per_processor(index_bits: int, parts: int, shared_memory: int) -> int:
    """Programs that a multiprocessor with ``shared_memory`` bytes runs at once.

    It has registers for the sums of 64 tokens only once.
    """
    if parts == PARTS[-1]:
        return 1
    return max(1, min(2, shared_memory // shared_bytes(index_bits)))


@functools.cache
def log_row_tiles(num_row_tiles: int, num_input_tiles: int, programs: int) -> int:
    """Log2 of the row tiles that share the warps of a program.

    Chosen so that the busiest program has the fewest rounds of its loop: with one row tile, some
    warps idle in the last round where they do not divide the tiles along the inputs.
    """

    def rounds(log: int) -> int:
        runs: int = triton.cdiv(triton.cdiv(num_row_tiles, 1 << log), programs)
        turns: int = triton.cdiv(num_input_tiles, WARPS >> log)
        return runs * turns

    return min(range(len(WARP_BASES) + 1), key=rounds)


@functools.cache
def constants(
    index_bits: int,
    dtype: torch.dtype,
    parts: int,
    shared_memory: int,
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and options of its compiler.

    Args:
        shared_memory: bytes that a multiprocessor has.
    """
    programs = programs_per_processor(index_bits, parts, shared_memory)
    return {
        "INDEX_BITS": index_bits,
        "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16,
        "PARTS": parts,
        "WARPS": WARPS,
        "WARP_BASES": WARP_BASES,
        "num_warps": WARPS,
        "maxnreg": REGISTERS[programs],
    }


def fits(dtype: torch.dtype, index_bits: int, processor: Processor | None) -> bool:
    """Whether the kernel can run on a processor, for activations of ``dtype``."""
    if kernels is None or processor is None or dtype not in GLUON_DTYPES:
        return False
    return shared_bytes(index_bits) <= processor.shared_memory


def gemm(
    rotated: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    processor: Processor,
    launcher: Launcher,
) -> None:
    """Launch the kernel: y [M, N] = rotated [M, K] times the packed weight, plus ``bias`` [N]."""
    assert kernels is not None
    num_tokens, num_inputs = rotated.shape
    parts, shared_memory = parts_of(num_tokens), processor.shared_memory
    programs = programs_per_processor(weight.index_bits, parts, shared_memory)
    programs *= processor.multiprocessors
    num_row_tiles, num_input_tiles = weight.tiles.shape[:2]
    log = log_row_tiles(num_row_tiles, num_input_tiles, programs)
    grid = (
        min(triton.cdiv(num_row_tiles, 1 << log), programs),
        triton.cdiv(num_tokens, 8 * parts),
    )
    launcher.launch(
        kernels.decode_gemm_kernel,
        grid,
        rotated.view(torch.int32),
        weight.tiles,
        weight.row_norms,
        weight.quadrant_words,
        y if bias is None else bias,
        y,
        num_tokens,
        weight.num_rows,
        num_inputs,
        int(bias is not None),
        log,
        **constants(weight.index_bits, rotated.dtype, parts, shared_memory),
    )
