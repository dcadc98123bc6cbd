"""Tiles and launchers of the Triton kernels. Needs triton; :mod:`qamw_kernels.ops` imports it at the first launch.

Nothing is autotuned: the tiles are the tables below. Arguments were checked by the ops and are not checked again.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qamw_kernels import gluon_launch
from qamw_kernels.triton_kernels import coordinates_kernel, dequantize_kernel, gemm_kernel, rotate_kernel

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Tile(NamedTuple):
    """Work of one program: BLOCK_M tokens (or rotation blocks) x 16 * ROW_TILES rows, or WIDTH inputs."""

    BLOCK_M: int
    ROW_TILES: int
    num_warps: int
    num_stages: int


SKINNY_MAX_TOKENS = 16
GEMM_MAX_TOKENS = 128
"""Above it, the weight is decoded and multiplied by torch. Not yet measured on a GPU."""
# (kind, bytes per activation element) -> tile. Every tile fits the 99 KB of shared memory of sm_89.
GEMM_TILES = {
    ("skinny", 2): Tile(BLOCK_M=16, ROW_TILES=4, num_warps=4, num_stages=3),
    ("skinny", 4): Tile(BLOCK_M=16, ROW_TILES=2, num_warps=4, num_stages=2),
    ("wide", 2): Tile(BLOCK_M=64, ROW_TILES=8, num_warps=8, num_stages=3),
    ("wide", 4): Tile(BLOCK_M=32, ROW_TILES=2, num_warps=8, num_stages=2),
}
# The Hadamard matrix is built and multiplied in pieces of at most this many inputs.
ROTATE_WIDTH, DEQUANTIZE_WIDTH = 64, 128
ROTATE_TILES = {
    2: Tile(BLOCK_M=16, ROW_TILES=0, num_warps=8, num_stages=1),
    4: Tile(BLOCK_M=16, ROW_TILES=0, num_warps=4, num_stages=1),
}
DECODE_TILE = Tile(BLOCK_M=0, ROW_TILES=4, num_warps=4, num_stages=1)
DECODE_CHUNKS = 4  # of 32 inputs, by one program of coordinates_kernel


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
    width = min(rotation_block_size, ROTATE_WIDTH)
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
    rotated: torch.Tensor, tiles: torch.Tensor, row_norms: torch.Tensor, quadrant_words: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Launch the kernel that suits the number of tokens. Arguments are those of the op ``qamw::gemm``, already checked."""
    rotated, tiles, row_norms = rotated.contiguous(), tiles.contiguous(), row_norms.contiguous()
    num_tokens, num_rows, num_inputs = len(rotated), len(row_norms), rotated.shape[1]
    if num_tokens > GEMM_MAX_TOKENS:
        coordinates = _coordinates(tiles, quadrant_words, num_rows, num_inputs, rotated.dtype)
        y = (rotated @ coordinates.T).mul_(row_norms)
        return y if bias is None else y.add_(bias)
    y = torch.empty(num_tokens, num_rows, dtype=rotated.dtype, device=rotated.device)
    if num_tokens == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    if gluon_launch.fits(rotated, tiles.shape[2]):
        with _on_device_of(rotated):
            gluon_launch.gemm(rotated, tiles, row_norms, quadrant_words, bias, y)
        return y
    tile = GEMM_TILES["skinny" if num_tokens <= SKINNY_MAX_TOKENS else "wide", rotated.element_size()]
    grid = (triton.cdiv(num_rows, 16 * tile.ROW_TILES), triton.cdiv(num_tokens, tile.BLOCK_M))
    with _on_device_of(rotated):
        gemm_kernel[grid](
            rotated, tiles, row_norms, quadrant_words, row_norms if bias is None else bias, y, num_tokens, num_rows, num_inputs,
            INDEX_BITS=tiles.shape[2], HAS_BIAS=bias is not None, DTYPE=TL_DTYPES[rotated.dtype],
            BLOCK_M=tile.BLOCK_M, ROW_TILES=tile.ROW_TILES, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return y


def _coordinates(
    tiles: torch.Tensor, quadrant_words: torch.Tensor, num_rows: int, num_inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """Launch :func:`coordinates_kernel`: [N, K] in ``dtype``."""
    out = torch.empty(num_rows, num_inputs, dtype=dtype, device=tiles.device)
    tile = DECODE_TILE
    grid = (triton.cdiv(num_rows, 16 * tile.ROW_TILES), triton.cdiv(num_inputs, 32 * DECODE_CHUNKS))
    with _on_device_of(tiles):
        coordinates_kernel[grid](
            tiles, quadrant_words, out, num_rows, num_inputs, INDEX_BITS=tiles.shape[2], DTYPE=TL_DTYPES[dtype],
            ROW_TILES=tile.ROW_TILES, CHUNKS=DECODE_CHUNKS, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return out


def dequantize(
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    rotation_block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch :func:`dequantize_kernel`. Arguments are those of the op ``qamw::dequantize``, already checked."""
    tiles, row_norms, input_scales = tiles.contiguous(), row_norms.contiguous(), input_scales.contiguous()
    num_rows, num_inputs = len(row_norms), len(input_scales)
    weight = torch.empty(num_rows, num_inputs, dtype=dtype, device=tiles.device)
    tile, width = DECODE_TILE, min(max(rotation_block_size, 32), DEQUANTIZE_WIDTH)
    grid = (triton.cdiv(num_rows, 16 * tile.ROW_TILES), num_inputs // width)
    with _on_device_of(tiles):
        dequantize_kernel[grid](
            tiles, row_norms, input_scales, quadrant_words, weight, num_rows, num_inputs, rotation_block_size**-0.5,
            INDEX_BITS=tiles.shape[2], B=rotation_block_size, WIDTH=width, DTYPE=TL_DTYPES[dtype],
            ROW_TILES=tile.ROW_TILES, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return weight
