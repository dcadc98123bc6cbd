"""Launchers of the kernels that rotate activations. Needs triton."""

import functools
from typing import Any

import torch

from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.ops.gluon import narrow_launch
from qamw_kernels.ops.launcher import ON_DEVICE, TL_DTYPES, Launcher, cdiv
from qamw_kernels.ops.routing import Routing
from qamw_kernels.ops.triton.rotate_kernels import rotate_kernel, rotate_many_kernel
from qamw_kernels.ops.weight import TiledWeight

WIDTH = 64  # the Hadamard matrix is built and multiplied in pieces of at most this many inputs
MANY_INPUTS = 3072 * 128
"""Inputs of all tokens together above which the kernel for many tokens is faster, by the model of
an H100; that kernel writes the swapped order only."""
MANY_PROGRAMS = 2  # of that kernel, on a multiprocessor


@functools.cache
def rotate_constants(
    rotation_block_size: int,
    dtype: torch.dtype,
    swapped: bool = False,
    early: bool = False,
) -> dict[str, Any]:
    """Compile-time arguments of ``rotate_kernel``, and options of its compiler.

    Args:
        swapped: see :func:`rotate`.
        early: whether the next kernel may begin before this one is complete.
    """
    blocks = 16
    if swapped:  # as many inputs as there are registers for
        blocks = max(4096 // max(rotation_block_size, 128), blocks)
    return {
        "B": rotation_block_size,
        "WIDTH": min(rotation_block_size, WIDTH),
        "BLOCK_R": blocks,
        "DTYPE": TL_DTYPES[dtype],
        "SWAPPED": swapped,
        "EARLY": early,
        "num_warps": 8 if dtype.itemsize == 2 else 4,
        "num_stages": 1,
    }


@functools.cache
def rotate_many_constants(
    rotation_block_size: int,
    dtype: torch.dtype,
    by_expert: bool = False,
    early: bool = False,
) -> dict[str, Any]:
    """Compile-time arguments of ``rotate_many_kernel``, and options of its compiler.

    Args:
        by_expert: see :func:`rotate_many`.
        early: see :func:`rotate_constants`.
    """
    return {
        "B": rotation_block_size,
        "BLOCK_M": 8192 // max(rotation_block_size, 128),
        "DTYPE": TL_DTYPES[dtype],
        "SORTED": by_expert,
        "EARLY": early,
        "num_warps": 8,
        "num_stages": 1,
    }


def many_grid(
    num_tokens: int, num_inputs: int, constants: dict[str, Any], multiprocessors: int
) -> tuple[int, int]:
    """The grid of ``rotate_many_kernel``: programs for each span of inputs, and number of spans."""
    spans = num_inputs // max(constants["B"], UNIT_INPUTS)
    most = max(MANY_PROGRAMS * multiprocessors // spans, 1)
    return min(cdiv(num_tokens, constants["BLOCK_M"]), most), spans


def rotate(
    x: torch.Tensor,
    input_scales: torch.Tensor,
    rotation_block_size: int,
    launcher: Launcher = ON_DEVICE,
    swapped: bool = False,
) -> torch.Tensor:
    """x [M, K] times ``input_scales`` [K], each block transformed: the operand of the products.

    Args:
        swapped: in the order that :mod:`qamw_kernels.ops.gluon.wide_kernels` wants.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    if swapped and x.numel() > MANY_INPUTS:
        rotate_many(x, input_scales, rotation_block_size, out, launcher=launcher)
        return out
    num_blocks = x.numel() // rotation_block_size
    early = _next_begins_early(launcher, x)
    constants = rotate_constants(rotation_block_size, x.dtype, swapped, early)
    grid = (
        cdiv(num_blocks, constants["BLOCK_R"]),
        rotation_block_size // constants["WIDTH"],
    )
    launcher.launch(
        rotate_kernel,
        grid,
        x,
        input_scales,
        out,
        num_blocks,
        len(input_scales) // rotation_block_size,
        rotation_block_size**-0.5,
        **constants,
    )
    return out


def _next_begins_early(launcher: Launcher, x: torch.Tensor) -> bool:
    """Whether the kernel after a rotation may begin before the rotation is complete."""
    processor = launcher.processor(x.device)
    return processor is not None and narrow_launch.begins_early(processor)


def rotate_sorted(
    x: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    num_slots: int,
    launcher: Launcher = ON_DEVICE,
) -> torch.Tensor:
    """:func:`rotate`, swapped, for the tokens of sorted slots: [sorted slots, K].

    Rows that are padding are not written, and so are undefined.
    """
    out = torch.empty(len(routing.slots), x.shape[1], dtype=x.dtype, device=x.device)
    size = weight.rotation_block_size
    rotate_many(x, weight.input_scales, size, out, routing, num_slots, launcher)
    return out


def rotate_many(
    x: torch.Tensor,
    input_scales: torch.Tensor,
    rotation_block_size: int,
    out: torch.Tensor,
    routing: Routing | None = None,
    num_slots: int = 0,
    launcher: Launcher = ON_DEVICE,
) -> None:
    """Launch the kernel for many tokens, which writes their inputs swapped.

    Args:
        out: [M, K]; with ``routing`` [sorted slots, K].
        routing: sorts the tokens by expert; None leaves them in their order.
        num_slots: of ``routing``, a multiple of M.
    """
    processor = launcher.processor(x.device)
    early = _next_begins_early(launcher, x)
    constants = rotate_many_constants(rotation_block_size, x.dtype, routing is not None, early)
    multiprocessors = processor.multiprocessors if processor else 1
    grid = many_grid(len(out), x.shape[1], constants, multiprocessors)
    launcher.launch(
        rotate_many_kernel,
        grid,
        x,
        input_scales,
        x if routing is None else routing.slots,
        x if routing is None else routing.num_sorted,
        out,
        len(out) if routing is None else num_slots,
        1 if routing is None else num_slots // len(x),
        grid[1],
        rotation_block_size**-0.5,
        **constants,
    )
