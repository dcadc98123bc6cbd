"""Tiles and launchers of the Triton kernels. Needs triton; :mod:`qamw_kernels.ops` imports it at the first launch.

Nothing is autotuned: the tiles are the tables below. Arguments were checked by the op and are not checked again.
"""

import contextlib
import functools
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qamw_kernels.ops.gluon import launch as gluon_launch
from qamw_kernels.ops.linear import quadrant_words
from qamw_kernels.ops.routing import sort_slots
from qamw_kernels.ops.tiling import TILE_ROWS, tiled_shape
from qamw_kernels.ops.triton.kernels import dequantize_kernel, gemm_kernel, rotate_kernel, routed_gemm_kernel

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Tile(NamedTuple):
    """Work of one program: BLOCK_M tokens (or rotation blocks) x 16 * ROW_TILES rows, or WIDTH inputs."""

    BLOCK_M: int
    ROW_TILES: int
    num_warps: int
    num_stages: int


SKINNY_MAX_TOKENS = 16
CROSSINGS = Path(__file__).with_name("crossings.json")  # crossing_key -> gemm_max_tokens; kernels/benchmarks/bench_linear.py measures it
GEMM_MAX_TOKENS = 128  # of a GPU that was not measured: twice what one program of the Gluon kernel holds
DEQUANTIZED_WEIGHTS = 1 << 26  # at once, so that the workspace is bounded: 128 MiB
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
DEQUANTIZE_TILE = Tile(BLOCK_M=0, ROW_TILES=4, num_warps=4, num_stages=1)


@functools.cache
def rotate_constants(rotation_block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of :func:`rotate_kernel`, and options of its compiler."""
    tile = ROTATE_TILES[dtype.itemsize]
    return {"B": rotation_block_size, "WIDTH": min(rotation_block_size, ROTATE_WIDTH), "BLOCK_R": tile.BLOCK_M, "DTYPE": TL_DTYPES[dtype],
            "num_warps": tile.num_warps, "num_stages": tile.num_stages}


@functools.cache
def gemm_constants(index_bits: int, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """Compile-time arguments of :func:`gemm_kernel`, and options of its compiler; ``kind`` is skinny or wide."""
    tile = GEMM_TILES[kind, dtype.itemsize]
    return {"INDEX_BITS": index_bits, "DTYPE": TL_DTYPES[dtype], "BLOCK_M": tile.BLOCK_M, "ROW_TILES": tile.ROW_TILES,
            "num_warps": tile.num_warps, "num_stages": tile.num_stages}


@functools.cache
def dequantize_constants(index_bits: int, rotation_block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of :func:`dequantize_kernel`, and options of its compiler."""
    tile, width = DEQUANTIZE_TILE, min(max(rotation_block_size, 32), DEQUANTIZE_WIDTH)
    return {"INDEX_BITS": index_bits, "B": rotation_block_size, "WIDTH": width, "DTYPE": TL_DTYPES[dtype], "ROW_TILES": tile.ROW_TILES,
            "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def crossing_key(device: torch.device) -> str:
    """What a measured crossing is good for: the GPU's name, and the kernel that the installed Triton has."""
    return f"{torch.cuda.get_device_name(device)}, {'gluon' if gluon_launch.kernels else 'plain'}"


@functools.cache
def gemm_max_tokens(device: torch.device) -> int:
    """Tokens up to which :func:`multiply_packed` is the faster way on that device."""
    measured = json.loads(CROSSINGS.read_text()) if device.type == "cuda" else {}
    return measured.get(crossing_key(device), GEMM_MAX_TOKENS) if measured else GEMM_MAX_TOKENS


class TiledWeight(NamedTuple):
    """A weight [N, K] as the kernels read it; fields are those of :func:`qamw_kernels.ops.linear`."""

    tiles: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    quadrant_words: torch.Tensor
    rotation_block_size: int

    @property
    def index_bits(self) -> int:
        return self.tiles.shape[2]

    def rows(self, start: int, stop: int) -> "TiledWeight":
        """Some rows of the weight; both multiples of TILE_ROWS."""
        return self._replace(tiles=self.tiles[start // TILE_ROWS : stop // TILE_ROWS], row_norms=self.row_norms[start:stop])


def linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    bias: torch.Tensor | None,
    rotation_block_size: int,
) -> torch.Tensor:
    """The op ``qamw::linear``, in the way that suits the number of tokens."""
    weight = TiledWeight(tiles.contiguous(), row_norms.contiguous(), input_scales.contiguous(), quadrant_words, rotation_block_size)
    bias = None if bias is None else bias.contiguous()
    multiply = multiply_packed if len(x) <= gemm_max_tokens(x.device) else multiply_dequantized
    return multiply(x.contiguous(), weight, bias)


def multiply_packed(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """:func:`linear` for few tokens: they are rotated, and multiplied with what the packed weight is decoded to on the way."""
    return gemm(rotate(x, weight.input_scales, weight.rotation_block_size), weight, bias)


def multiply_dequantized(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """:func:`linear` for many tokens: the weight is decoded into a workspace, and the vendor's GEMM multiplies."""
    y = torch.empty(len(x), len(weight.row_norms), dtype=x.dtype, device=x.device)
    rows_at_once = max(DEQUANTIZED_WEIGHTS // x.shape[1] // TILE_ROWS, 1) * TILE_ROWS
    for start in range(0, y.shape[1], rows_at_once):
        rows = slice(start, start + rows_at_once)
        decoded = dequantize(weight.rows(rows.start, rows.stop), x.dtype)
        if bias is None:
            torch.mm(x, decoded.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, decoded.T, out=y[:, rows])
        del decoded  # or the next one would be a second workspace
    return y


def routed_block_size(num_slots: int, num_experts: int, dtype: torch.dtype) -> int:
    """Slots of one expert that a program takes: more, where experts have more of them on average."""
    kind = "skinny" if num_slots <= SKINNY_MAX_TOKENS * num_experts else "wide"
    return GEMM_TILES[kind, dtype.itemsize].BLOCK_M


def routed_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    num_sorted: torch.Tensor,
    block_size: int,
    num_slots: int,
    rotation_block_size: int,
) -> torch.Tensor:
    """The op ``qamw::routed_linear``; ``block_size`` is one of :func:`routed_block_size`."""
    num_rows, num_inputs = row_norms.shape[1], x.shape[1]
    y = torch.zeros(num_slots, num_rows, dtype=x.dtype, device=x.device)
    if num_slots == 0:
        return y
    rotated = rotate(x.contiguous(), input_scales.contiguous(), rotation_block_size)
    kind = next(kind for kind in ("skinny", "wide") if block_size == GEMM_TILES[kind, x.dtype.itemsize].BLOCK_M)
    constants = gemm_constants(tiles.shape[3], x.dtype, kind)
    grid = (triton.cdiv(num_rows, TILE_ROWS * constants["ROW_TILES"]), len(experts))
    with _on_device_of(x):
        routed_gemm_kernel[grid](
            rotated, tiles.contiguous(), row_norms.contiguous(), quadrant_words, slots, experts, num_sorted, y,
            num_slots, num_slots // len(x), num_rows, num_inputs, **constants)
    return y


def warm_up(rates: Collection[int], rotation_block_sizes: Collection[int], dtype: torch.dtype, device: torch.device,
            experts: bool = False) -> None:
    """Compile all that the ops launch for weights of these index bits and rotations, whatever their and the input's sizes;
    those for experts only if there are some.

    To be called before a CUDA graph is captured. Compilers run at once, one thread each; what they made stays in Triton's cache on disk.
    """
    def run(index_bits: int, size: int, num_tokens: int, kind: str = "packed") -> None:
        x = torch.zeros(num_tokens, max(size, 64), dtype=dtype, device=device)
        tiles = torch.zeros(tiled_shape(1, x.shape[1], index_bits), dtype=torch.int32, device=device)
        words, scales = quadrant_words(index_bits, device), torch.ones(x.shape[1], dtype=torch.float16, device=device)
        norms = torch.ones(1, dtype=torch.float32, device=device)
        if kind == "routed":
            block_size = routed_block_size(num_tokens, 1, dtype)
            slots, experts, num_sorted, _ = sort_slots(torch.zeros(num_tokens, 1, dtype=torch.int32, device=device), block_size, 1)
            routed_linear(x, tiles[None], norms[None], scales, words, slots, experts, num_sorted, block_size, num_tokens, size)
            return
        weight = TiledWeight(tiles, norms, scales, words, size)
        if kind == "packed":
            multiply_packed(x, weight, None)
        else:  # without the vendor's GEMM, which would keep a workspace for each of the threads
            dequantize(weight, dtype)

    few = sorted({8 * parts for parts in gluon_launch.PARTS} | {SKINNY_MAX_TOKENS, SKINNY_MAX_TOKENS + 1})
    for size in rotation_block_sizes:
        run(min(rates), size, few[0])
    jobs = [(bits, min(rotation_block_sizes), m, "packed") for bits in rates for m in few]
    jobs += [(bits, size, 1, "dequantized") for bits in rates for size in rotation_block_sizes]
    if experts:
        jobs += [(bits, min(rotation_block_sizes), m, "routed") for bits in rates for m in (SKINNY_MAX_TOKENS, SKINNY_MAX_TOKENS + 1)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: run(*job), jobs))


def rotate(x: torch.Tensor, input_scales: torch.Tensor, rotation_block_size: int) -> torch.Tensor:
    """x [M, K] times ``input_scales`` [K], each block of inputs transformed: what :func:`gemm` multiplies."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    constants = rotate_constants(rotation_block_size, x.dtype)
    num_blocks = x.numel() // rotation_block_size
    grid = (triton.cdiv(num_blocks, constants["BLOCK_R"]), rotation_block_size // constants["WIDTH"])
    with _on_device_of(x):
        rotate_kernel[grid](
            x, input_scales, out, num_blocks, len(input_scales) // rotation_block_size, rotation_block_size**-0.5, **constants)
    return out


def gemm(rotated: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``rotated`` [M, K] times the packed weight: [M, N] in its dtype."""
    num_tokens, num_rows, num_inputs = len(rotated), len(weight.row_norms), rotated.shape[1]
    y = torch.empty(num_tokens, num_rows, dtype=rotated.dtype, device=rotated.device)
    if num_tokens == 0:
        return y
    if gluon_launch.fits(rotated, weight.index_bits):
        with _on_device_of(rotated):
            gluon_launch.gemm(rotated, weight.tiles, weight.row_norms, weight.quadrant_words, bias, y)
        return y
    constants = gemm_constants(weight.index_bits, rotated.dtype, "skinny" if num_tokens <= SKINNY_MAX_TOKENS else "wide")
    grid = (triton.cdiv(num_rows, TILE_ROWS * constants["ROW_TILES"]), triton.cdiv(num_tokens, constants["BLOCK_M"]))
    with _on_device_of(rotated):
        gemm_kernel[grid](
            rotated, weight.tiles, weight.row_norms, weight.quadrant_words, y if bias is None else bias, y,
            num_tokens, num_rows, num_inputs, int(bias is not None), **constants)
    return y


def dequantize(weight: TiledWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in ``dtype``, in the basis of the unrotated input."""
    num_rows, num_inputs, size = len(weight.row_norms), len(weight.input_scales), weight.rotation_block_size
    out = torch.empty(num_rows, num_inputs, dtype=dtype, device=weight.tiles.device)
    constants = dequantize_constants(weight.index_bits, size, dtype)
    grid = (triton.cdiv(num_rows, TILE_ROWS * constants["ROW_TILES"]), num_inputs // constants["WIDTH"])
    with _on_device_of(weight.tiles):
        dequantize_kernel[grid](
            weight.tiles, weight.row_norms, weight.input_scales, weight.quadrant_words, out, num_rows, num_inputs, size**-0.5, **constants)
    return out
