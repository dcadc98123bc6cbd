"""Tiles and launchers of the Triton kernels. Needs triton; :mod:`qamw_kernels.ops` imports it at the first launch.

Nothing is autotuned: the tiles are the tables below. Arguments were checked by the ops and are not checked again.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qamw_kernels.packing import UNIT_INPUTS
from qamw_kernels.triton_kernels import dequantize_kernel, gemm_kernel, rotate_kernel

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Tile(NamedTuple):
    """Work of one program: BLOCK_M tokens (or rotation blocks) x BLOCK_N rows x 64 * UNITS inputs at a time."""

    BLOCK_M: int
    BLOCK_N: int
    UNITS: int
    num_warps: int
    num_stages: int


SKINNY_MAX_TOKENS = 16
# (kind, bytes per activation element) -> tile. Every tile fits the 99 KB of shared memory of sm_89.
GEMM_TILES = {
    ("skinny", 2): Tile(BLOCK_M=16, BLOCK_N=64, UNITS=2, num_warps=4, num_stages=3),
    ("skinny", 4): Tile(BLOCK_M=16, BLOCK_N=32, UNITS=1, num_warps=4, num_stages=2),
    ("prefill", 2): Tile(BLOCK_M=64, BLOCK_N=128, UNITS=1, num_warps=8, num_stages=3),
    ("prefill", 4): Tile(BLOCK_M=32, BLOCK_N=32, UNITS=1, num_warps=8, num_stages=2),
}
# The Hadamard matrix is built and multiplied in pieces of at most 64 * UNITS inputs.
ROTATE_TILES = {
    2: Tile(BLOCK_M=16, BLOCK_N=0, UNITS=1, num_warps=8, num_stages=1),
    4: Tile(BLOCK_M=16, BLOCK_N=0, UNITS=1, num_warps=4, num_stages=1),
}
DEQUANTIZE_TILE = Tile(BLOCK_M=0, BLOCK_N=64, UNITS=2, num_warps=4, num_stages=1)


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def rotate(x: torch.Tensor, input_scales: torch.Tensor, rotation_block_size: int) -> torch.Tensor:
    """Launch :func:`rotate_kernel`. Arguments are those of the op ``qamw::rotate``, already checked."""
    x, input_scales = x.contiguous(), input_scales.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    tile = ROTATE_TILES[x.element_size()]
    width = min(rotation_block_size, tile.UNITS * UNIT_INPUTS)
    num_blocks = x.numel() // rotation_block_size
    grid = (triton.cdiv(num_blocks, tile.BLOCK_M), rotation_block_size // width)
    with _on_device_of(x):
        rotate_kernel[grid](
            x, input_scales, out, num_blocks, len(input_scales) // rotation_block_size, rotation_block_size**-0.5,
            B=rotation_block_size, WIDTH=width, BLOCK_R=tile.BLOCK_M, DTYPE=TL_DTYPES[x.dtype],
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return out


def gemm(
    rotated: torch.Tensor, qweight: torch.Tensor, row_norms: torch.Tensor, quadrant_words: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Launch :func:`gemm_kernel` with the skinny or the prefill tile. Arguments are those of the op ``qamw::gemm``."""
    rotated, qweight, row_norms = rotated.contiguous(), qweight.contiguous(), row_norms.contiguous()
    num_tokens, num_rows = len(rotated), len(row_norms)
    y = torch.empty(num_tokens, num_rows, dtype=rotated.dtype, device=rotated.device)
    if num_tokens == 0:
        return y
    tile = GEMM_TILES["skinny" if num_tokens <= SKINNY_MAX_TOKENS else "prefill", rotated.element_size()]
    grid = (triton.cdiv(num_rows, tile.BLOCK_N), triton.cdiv(num_tokens, tile.BLOCK_M))
    with _on_device_of(rotated):
        gemm_kernel[grid](
            rotated, qweight, row_norms, quadrant_words, row_norms if bias is None else bias.contiguous(), y,
            num_tokens, num_rows, qweight.shape[2],
            INDEX_BITS=qweight.shape[0], HAS_BIAS=bias is not None, DTYPE=TL_DTYPES[rotated.dtype],
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, UNITS=tile.UNITS,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return y


def dequantize(
    qweight: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    rotation_block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch :func:`dequantize_kernel`. Arguments are those of the op ``qamw::dequantize``, already checked."""
    qweight, row_norms, input_scales = qweight.contiguous(), row_norms.contiguous(), input_scales.contiguous()
    num_rows, num_inputs = len(row_norms), len(input_scales)
    weight = torch.empty(num_rows, num_inputs, dtype=dtype, device=qweight.device)
    tile = DEQUANTIZE_TILE
    tile_inputs = tile.UNITS * UNIT_INPUTS
    grid = (triton.cdiv(num_rows, tile.BLOCK_N), triton.cdiv(num_inputs, tile_inputs))
    with _on_device_of(qweight):
        dequantize_kernel[grid](
            qweight, row_norms, input_scales, quadrant_words, weight,
            num_rows, qweight.shape[2], rotation_block_size**-0.5,
            INDEX_BITS=qweight.shape[0], B=rotation_block_size, WIDTH=min(rotation_block_size, tile_inputs),
            DTYPE=TL_DTYPES[dtype], BLOCK_N=tile.BLOCK_N, UNITS=tile.UNITS,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return weight
