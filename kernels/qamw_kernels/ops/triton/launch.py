"""Tiles and launchers of the Triton kernels. Needs triton; the ops import it at the first launch.

Nothing is autotuned: the tiles are the tables below. Arguments were checked by the op and are not
checked again.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.ops.crossover import gemm_max_tokens
from qamw_kernels.ops.gluon import (
    dequantize_launch,
    routed_launch,
    wide_launch,
)
from qamw_kernels.ops.gluon.products import product_for
from qamw_kernels.ops.launcher import ON_DEVICE, TL_DTYPES, Launcher, Processor, cdiv
from qamw_kernels.ops.routing import Routing
from qamw_kernels.ops.tiling import TILE_ROWS
from qamw_kernels.ops.triton.kernels import (
    combine_kernel,
    dequantize_kernel,
    gemm_kernel,
    routed_gemm_kernel,
)
from qamw_kernels.ops.triton.rotate_launch import rotate, rotate_sorted
from qamw_kernels.ops.weight import Rate, TiledWeight


class Tile(NamedTuple):
    """Work of one program.

    BLOCK_M tokens, or WIDTH inputs, x 16 * ROW_TILES rows.
    """

    BLOCK_M: int
    ROW_TILES: int
    num_warps: int
    num_stages: int


SKINNY_MAX_TOKENS = 16
DEQUANTIZED_WEIGHTS = 1 << 26
"""Weights decoded at once, so that the workspace is bounded: 128 MiB in 16 bits."""

# (kind, bytes per activation element) -> tile. Every tile fits the 99 KB of shared memory of sm_89.
GEMM_TILES = {
    ("skinny", 2): Tile(BLOCK_M=16, ROW_TILES=4, num_warps=4, num_stages=3),
    ("skinny", 4): Tile(BLOCK_M=16, ROW_TILES=2, num_warps=4, num_stages=2),
    ("wide", 2): Tile(BLOCK_M=64, ROW_TILES=8, num_warps=8, num_stages=3),
    ("wide", 4): Tile(BLOCK_M=32, ROW_TILES=2, num_warps=8, num_stages=2),
}
# The Hadamard matrix is built and multiplied in pieces of at most this many inputs.
DEQUANTIZE_WIDTH = 128
DEQUANTIZE_ROW_TILES = 4  # of a program


@functools.cache
def gemm_constants(rate: Rate, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """Compile-time arguments of ``gemm_kernel`` and ``routed_gemm_kernel``, and compiler options.

    Args:
        kind: ``skinny`` or ``wide``.
    """
    tile = GEMM_TILES[kind, dtype.itemsize]
    return {
        "INDEX_BITS": rate.index_bits,
        "ENTRY_BITS": rate.entry_bits,
        "DTYPE": TL_DTYPES[dtype],
        "BLOCK_M": tile.BLOCK_M,
        "ROW_TILES": tile.ROW_TILES,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@functools.cache
def dequantize_constants(
    rate: Rate,
    rotation_block_size: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Compile-time arguments of ``dequantize_kernel``, and options of its compiler."""
    return {
        "INDEX_BITS": rate.index_bits,
        "ENTRY_BITS": rate.entry_bits,
        "B": rotation_block_size,
        "WIDTH": min(max(rotation_block_size, 32), DEQUANTIZE_WIDTH),
        "DTYPE": TL_DTYPES[dtype],
        "ROW_TILES": DEQUANTIZE_ROW_TILES,
        "num_warps": 4,
        "num_stages": 1,
    }


@functools.cache
def combine_constants(dtype: torch.dtype, num_rows: int) -> dict[str, Any]:
    """Compile-time arguments of ``combine_kernel``, and options of its compiler."""
    unit = 1 if num_rows % 16 else 16
    return {"UNIT": unit, "BLOCK_N": 1024, "DTYPE": TL_DTYPES[dtype], "num_warps": 4}


def linear(
    x: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    launcher: Launcher = ON_DEVICE,
) -> torch.Tensor:
    """The op ``qamw::linear``, in the way that suits the number of tokens."""
    weight = weight.contiguous()
    # Kernels are compiled for biases of the activations' dtype, and for no other while serving.
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    processor = launcher.processor(x.device)
    if len(x) <= gemm_max_tokens(x.device, x.dtype, weight.rate, processor):
        return multiply_packed(x.contiguous(), weight, bias, launcher=launcher)
    return multiply_dequantized(x.contiguous(), weight, bias, launcher=launcher)


def multiply_packed(
    x: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    launcher: Launcher = ON_DEVICE,
) -> torch.Tensor:
    """:func:`linear` for few tokens: rotate them, multiply with the weight as it is decoded."""
    y = torch.empty(len(x), weight.num_rows, dtype=x.dtype, device=x.device)
    if len(x) == 0:
        return y
    processor, (num_tokens, num_inputs) = launcher.processor(x.device), x.shape
    product = product_for(num_tokens, num_inputs, x.dtype, weight.rate, processor)
    swapped = product is wide_launch
    rotated = rotate(x, weight.input_scales, weight.rotation_block_size, launcher, swapped)
    if product is None or processor is None:
        gemm(rotated, weight, bias, y, launcher)
    else:
        product.gemm(rotated, weight, bias, y, processor, launcher)
    return y


def multiply_dequantized(
    x: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    weights_at_once: int = DEQUANTIZED_WEIGHTS,
    launcher: Launcher = ON_DEVICE,
) -> torch.Tensor:
    """:func:`linear` for many tokens: decode the weight, and let the vendor's GEMM multiply.

    Args:
        weights_at_once: how many weights the workspace holds, in whole row tiles.
    """
    y = torch.empty(len(x), weight.num_rows, dtype=x.dtype, device=x.device)
    rows_at_once = max(weights_at_once // x.shape[1] // TILE_ROWS, 1) * TILE_ROWS
    for start in range(0, y.shape[1], rows_at_once):
        rows = slice(start, start + rows_at_once)
        decoded = dequantize(weight.rows(rows.start, rows.stop), x.dtype, launcher)
        if bias is None:
            torch.mm(x, decoded.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, decoded.T, out=y[:, rows])
        del decoded  # or the next one would be a second workspace
    return y


def routed_block_size(
    num_slots: int,
    num_experts: int,
    dtype: torch.dtype,
    weights: Sequence[TiledWeight],
    launcher: Launcher = ON_DEVICE,
) -> int:
    """Slots of one expert that a program takes: more, where experts have more on average.

    Args:
        num_experts: that slots are sent to, on all ranks.
        weights: all that will be multiplied with these slots.
    """
    processor = launcher.processor(weights[0].tiles.device)
    for size in routed_launch.sizes_for(num_slots, num_experts):
        if all(routed_launch.fits(size, w.num_inputs, dtype, w.rate, processor) for w in weights):
            return size
    kind = "skinny" if num_slots <= SKINNY_MAX_TOKENS * num_experts else "wide"
    return GEMM_TILES[kind, dtype.itemsize].BLOCK_M


def routed_block_sizes(dtype: torch.dtype, rate: Rate, processor: Processor | None) -> set[int]:
    """All that :func:`routed_block_size` may give."""
    plain = {GEMM_TILES[kind, dtype.itemsize].BLOCK_M for kind in ("skinny", "wide")}
    return plain | {
        size
        for size in routed_launch.BLOCK_SIZES
        if routed_launch.fits(size, UNIT_INPUTS, dtype, rate, processor)
    }


def routed_linear(
    x: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    num_slots: int,
    launcher: Launcher = ON_DEVICE,
) -> torch.Tensor:
    """The op ``qamw::routed_linear``; the block size is one of :func:`routed_block_size`."""
    y = torch.zeros(num_slots, weight.num_rows, dtype=x.dtype, device=x.device)
    if num_slots == 0:
        return y
    x, weight, processor = x.contiguous(), weight.contiguous(), launcher.processor(x.device)
    size, num_inputs, rate = routing.block_size, weight.num_inputs, weight.rate
    fits = routed_launch.fits(size, num_inputs, x.dtype, rate, processor)
    if processor and fits and routed_launch.is_wide(size):
        rotated = rotate_sorted(x, weight, routing, num_slots, launcher)
        routed_launch.wide_gemm(rotated, weight, routing, y, processor, launcher)
        return y
    rotated = rotate(x, weight.input_scales, weight.rotation_block_size, launcher)
    if processor and fits:
        routed_launch.narrow_gemm(rotated, weight, routing, y, processor, launcher)
    else:
        routed_gemm(rotated, weight, routing, y, launcher)
    return y


def routed_gemm(
    rotated: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    y: torch.Tensor,
    launcher: Launcher = ON_DEVICE,
) -> None:
    """Launch the plain kernel: the rows of y [slots, N] whose experts are here."""
    kind = next(
        kind
        for kind in ("skinny", "wide")
        if routing.block_size == GEMM_TILES[kind, y.dtype.itemsize].BLOCK_M
    )
    constants = gemm_constants(weight.rate, y.dtype, kind)
    row_blocks = cdiv(weight.num_rows, TILE_ROWS * constants["ROW_TILES"])
    launcher.launch(
        routed_gemm_kernel,
        (row_blocks, len(routing.experts)),
        rotated,
        weight.tiles,
        weight.row_norms,
        weight.entry_words,
        routing.slots,
        routing.experts,
        routing.num_sorted,
        y,
        len(y),
        len(y) // len(rotated),
        weight.num_rows,
        weight.num_inputs,
        **constants,
    )


def combine(y: torch.Tensor, shares: torch.Tensor, launcher: Launcher = ON_DEVICE) -> torch.Tensor:
    """The op ``qamw::combine``."""
    out = torch.empty(len(shares), y.shape[1], dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    constants = combine_constants(y.dtype, y.shape[1])
    launcher.launch(
        combine_kernel,
        (len(shares), cdiv(y.shape[1], constants["BLOCK_N"])),
        y.contiguous(),
        shares.contiguous(),
        out,
        y.shape[1] // constants["UNIT"],
        shares.shape[1],
        **constants,
    )
    return out


def gemm(
    rotated: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    launcher: Launcher = ON_DEVICE,
) -> None:
    """Launch the plain kernel: y [M, N] = rotated [M, K] times the packed weight, plus ``bias``."""
    num_tokens, num_inputs = rotated.shape
    num_rows = weight.num_rows
    kind = "skinny" if num_tokens <= SKINNY_MAX_TOKENS else "wide"
    constants = gemm_constants(weight.rate, rotated.dtype, kind)
    grid = (
        cdiv(num_rows, TILE_ROWS * constants["ROW_TILES"]),
        cdiv(num_tokens, constants["BLOCK_M"]),
    )
    launcher.launch(
        gemm_kernel,
        grid,
        rotated,
        weight.tiles,
        weight.row_norms,
        weight.entry_words,
        y if bias is None else bias,
        y,
        num_tokens,
        num_rows,
        num_inputs,
        int(bias is not None),
        **constants,
    )


def dequantize(
    weight: TiledWeight,
    dtype: torch.dtype,
    launcher: Launcher = ON_DEVICE,
) -> torch.Tensor:
    """The weight [N, K] in ``dtype``, in the basis of the unrotated input."""
    num_rows, num_inputs, size = weight.num_rows, weight.num_inputs, weight.rotation_block_size
    out = torch.empty(num_rows, num_inputs, dtype=dtype, device=weight.tiles.device)
    processor = launcher.processor(out.device)
    if processor and dequantize_launch.fits(dtype, weight.rate, size, processor):
        dequantize_launch.dequantize(weight, out, processor, launcher)
        return out
    constants = dequantize_constants(weight.rate, size, dtype)
    grid = (
        cdiv(num_rows, TILE_ROWS * constants["ROW_TILES"]),
        num_inputs // constants["WIDTH"],
    )
    launcher.launch(
        dequantize_kernel,
        grid,
        weight.tiles,
        weight.row_norms,
        weight.input_scales,
        weight.entry_words,
        out,
        num_rows,
        num_inputs,
        size**-0.5,
        **constants,
    )
    return out
