"""Launcher of the Gluon kernel, where the installed Triton has what it needs: shared-memory gather, from 3.7.1 on."""

import functools
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

GLUON_DTYPES = (torch.bfloat16, torch.float16)
WARP_BASES = ((128,), (256,), (512,))  # a warp has 128 of the words that a program loads at once
WARPS = 1 << len(WARP_BASES)
PARTS = (1, 2, 4, 8)  # of 8 tokens, by one program
REGISTERS = {1: 255, 2: 128}  # that a thread may have, by programs on a multiprocessor; the compiler would save some by spilling others


def _load_kernels() -> ModuleType | None:
    """:mod:`qamw_kernels.gluon_kernels`; None with an older Triton, or in the interpreter, which does not know Gluon."""
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
    """Programs that a multiprocessor with so many bytes of shared memory runs at once: it has registers for 64 tokens but once."""
    return 1 if parts == PARTS[-1] else max(1, min(2, shared_memory // shared_bytes(index_bits)))


@functools.cache
def log_row_tiles(num_row_tiles: int, num_input_tiles: int, programs: int) -> int:
    """Log2 of the row tiles among which a program shares out its warps: so that the busiest program has the fewest rounds of its loop.

    With one row tile, some warps idle in the last round where they do not divide the tiles along the inputs.
    """
    def rounds(log: int) -> int:
        runs = triton.cdiv(triton.cdiv(num_row_tiles, 1 << log), programs)
        return runs * triton.cdiv(num_input_tiles, WARPS >> log)

    return min(range(len(WARP_BASES) + 1), key=rounds)


@functools.cache
def constants(index_bits: int, dtype: torch.dtype, parts: int, shared_memory: int) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and options of its compiler, for a multiprocessor with so many bytes of shared memory."""
    programs = programs_per_processor(index_bits, parts, shared_memory)
    return {"INDEX_BITS": index_bits, "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16, "PARTS": parts, "WARPS": WARPS,
            "WARP_BASES": WARP_BASES, "num_warps": WARPS, "maxnreg": REGISTERS[programs]}


@functools.cache
def _device_properties(index: int) -> dict[str, int]:
    return triton.runtime.driver.active.utils.get_device_properties(index)


def fits(rotated: torch.Tensor, index_bits: int) -> bool:
    """Whether the kernel can run on the device and in the dtype of ``rotated``."""
    if kernels is None or not rotated.is_cuda or rotated.dtype not in GLUON_DTYPES:
        return False
    return shared_bytes(index_bits) <= _device_properties(rotated.device.index)["max_shared_mem"]


def gemm(rotated: torch.Tensor, tiles: torch.Tensor, row_norms: torch.Tensor, quadrant_words: torch.Tensor, bias: torch.Tensor | None,
         y: torch.Tensor) -> None:
    """Launch :func:`qamw_kernels.gluon_kernels.decode_gemm_kernel`; arguments as in :func:`qamw_kernels.triton_launch.gemm`, y [M, N]."""
    assert kernels is not None
    num_tokens, num_inputs = rotated.shape
    index_bits, parts, device = tiles.shape[2], parts_of(num_tokens), _device_properties(rotated.device.index)
    programs = programs_per_processor(index_bits, parts, device["max_shared_mem"]) * device["multiprocessor_count"]
    log = log_row_tiles(tiles.shape[0], tiles.shape[1], programs)
    grid = (min(triton.cdiv(tiles.shape[0], 1 << log), programs), triton.cdiv(num_tokens, 8 * parts))
    kernels.decode_gemm_kernel[grid](
        rotated.view(torch.int32), tiles, row_norms, quadrant_words, y if bias is None else bias, y,
        num_tokens, len(row_norms), num_inputs, int(bias is not None), log,
        **constants(index_bits, rotated.dtype, parts, device["max_shared_mem"]),
    )
