"""Launcher of the Gluon kernel for up to 512 tokens.

It needs compute capability 9.0, and a Triton that can compile the kernel: 3.7.1 or newer.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton

from qamw_kernels.ops.gluon import table
from qamw_kernels.ops.launcher import TL_DTYPES, Launcher, Processor
from qamw_kernels.ops.tiling import TILE_INPUTS, TILE_ROWS
from qamw_kernels.ops.weight import TiledWeight

MAX_TOKENS = 512  # of a GPU that was not measured
WARP_BASES = ((128,), (256,), (512,))  # a warp has 128 of the words that a program loads at once
WARPS = 1 << len(WARP_BASES)
ROWS = TILE_ROWS * WARPS  # of a row block
RING = 2  # blocks of activations in shared memory: one is multiplied, one on its way
RESERVED = 1024  # bytes of shared memory of every program that the driver has


class Tile(NamedTuple):
    """How a program multiplies.

    Attributes:
        stage_inputs: decoded at once: 32 takes fewer registers, 64 fewer barriers.
        programs: on a multiprocessor, where their shared memory fits.
    """

    stage_inputs: int
    programs: int


TILES = {16: Tile(64, 2), 32: Tile(32, 2), 64: Tile(64, 1), 128: Tile(64, 1)}
"""By the tokens that a program has. Nothing is spilled with these."""

ADDING_UNITS = 1
"""What it costs to add up row blocks that programs share, in units of a program's work."""


def _load_kernels() -> ModuleType | None:
    """:mod:`qamw_kernels.ops.gluon.wide_kernels`, where it can be compiled."""
    if not table.HAS_GATHER:
        return None
    try:
        from qamw_kernels.ops.gluon import wide_kernels
    except ImportError:
        return None
    return wide_kernels


kernels = _load_kernels()


class Share(NamedTuple):
    """How the units of a weight are shared out among programs; see the kernels' module.

    Attributes:
        programs: for every group of tokens.
        grain: units that stay together: 1, or all of a row block, so that nothing is added up.
    """

    programs: int
    grain: int


@functools.cache
def share_out(row_blocks: int, input_tiles: int, programs: int) -> Share:
    """The share that lets the busiest of at most ``programs`` programs end first."""
    split = triton.cdiv(row_blocks * input_tiles, programs) + ADDING_UNITS
    if triton.cdiv(row_blocks, programs) * input_tiles <= split:
        return Share(min(programs, row_blocks), input_tiles)
    return Share(min(programs, row_blocks * input_tiles), 1)


class Grid(NamedTuple):
    """The programs of a launch.

    Attributes:
        tokens: that one program has.
        groups: of tokens.
        share: of the weight, among the programs of a group.
        adds: whether row blocks are left that programs share, for another kernel to add up.
    """

    tokens: int
    groups: int
    share: Share
    adds: bool


def grid(
    num_tokens: int, num_rows: int, input_tiles: int, index_bits: int, processor: Processor
) -> Grid:
    """The programs that multiply so many tokens with a weight."""
    tokens = tokens_of(num_tokens)
    programs = programs_per_processor(index_bits, tokens, processor.shared_memory)
    programs *= processor.multiprocessors
    groups = triton.cdiv(num_tokens, tokens)
    share = share_out(triton.cdiv(num_rows, ROWS), input_tiles, max(programs // groups, 1))
    return Grid(tokens, groups, share, share.grain < input_tiles and share.programs > 1)


def tokens_of(num_tokens: int) -> int:
    """Tokens that one program has."""
    return next((tokens for tokens in TILES if num_tokens <= tokens), max(TILES))


def programs_per_processor(index_bits: int, tokens: int, shared_memory: int) -> int:
    """Programs that a multiprocessor runs at once."""
    programs = TILES[tokens].programs
    return programs if block_inputs(index_bits, tokens, programs, shared_memory) else 1


def block_inputs(index_bits: int, tokens: int, programs: int, shared_memory: int) -> int:
    """Inputs of a block of activations: as many as fit beside the table; 0 if too few do.

    Args:
        programs: that share a multiprocessor.
        shared_memory: bytes that one program may have, if it is alone.
    """
    free = (shared_memory + RESERVED) // programs - RESERVED
    free -= table.table_bytes(index_bits) + 8 * RING
    fitting = free // (2 * tokens * RING)
    return min(1 << fitting.bit_length() - 1, TILE_INPUTS) if fitting >= 64 else 0


@functools.cache
def constants(
    index_bits: int,
    dtype: torch.dtype,
    tokens: int,
    shared_memory: int,
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and options of its compiler.

    Args:
        tokens: of one program.
        shared_memory: bytes that one program may have.
    """
    programs = programs_per_processor(index_bits, tokens, shared_memory)
    return {
        "INDEX_BITS": index_bits,
        "DTYPE": TL_DTYPES[dtype],
        "TOKENS": tokens,
        "BLOCK_INPUTS": block_inputs(index_bits, tokens, programs, shared_memory),
        "RING": RING,
        "STAGE_INPUTS": TILES[tokens].stage_inputs,
        "WARPS": WARPS,
        "WARP_BASES": WARP_BASES,
        "num_warps": WARPS,
        "maxnreg": table.REGISTERS[programs],
    }


@functools.cache
def descriptor_layout(block_shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """How blocks of activations lie in shared memory: in the order that the matrix unit reads."""
    from triton.experimental.gluon import language as gl

    gl_dtype = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block_shape), gl_dtype)


def runs_on(dtype: torch.dtype, index_bits: int, processor: Processor | None) -> bool:
    """Whether a processor has the kernel, for activations of ``dtype``."""
    if kernels is None or processor is None or processor.compute_capability != 90:
        return False
    return table.fits(dtype, index_bits, processor)


def fits(
    num_tokens: int,
    num_inputs: int,
    dtype: torch.dtype,
    index_bits: int,
    processor: Processor | None,
) -> bool:
    """Whether the kernel can multiply on a processor: any number of tokens and inputs."""
    return runs_on(dtype, index_bits, processor)


def gemm(
    rotated: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    processor: Processor,
    launcher: Launcher,
) -> None:
    """Launch the kernel: y [M, N] = rotated [M, K] times the packed weight, plus ``bias`` [N].

    Args:
        rotated: swapped, see :mod:`qamw_kernels.ops.gluon.wide_kernels`.
    """
    assert kernels is not None and y.numel() < 2**31
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    (num_tokens, num_inputs), num_rows = rotated.shape, weight.num_rows
    input_tiles, index_bits = weight.tiles.shape[1], weight.index_bits
    tokens, groups, share, adds = grid(num_tokens, num_rows, input_tiles, index_bits, processor)
    sums = weight.row_norms  # of the right type; nothing is written to it
    if adds:
        shape = (groups, share.programs, 2, tokens, ROWS)
        sums = torch.empty(shape, dtype=torch.float32, device=y.device)
    chosen = constants(index_bits, rotated.dtype, tokens, processor.shared_memory)
    block_shape = (tokens, chosen["BLOCK_INPUTS"])
    layout = descriptor_layout(block_shape, rotated.dtype)
    launcher.launch(
        kernels.wide_gemm_kernel,
        (share.programs, groups),
        weight.tiles,
        TensorDescriptor.from_tensor(rotated, list(block_shape), layout),
        weight.row_norms,
        weight.quadrant_words,
        y if bias is None else bias,
        y,
        sums,
        num_tokens,
        num_rows,
        num_inputs,
        int(bias is not None),
        share.grain,
        **chosen,
    )
    if adds:
        add_sums(sums, weight, bias, y, launcher)


def add_sums(
    sums: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    launcher: Launcher,
) -> None:
    """Launch the kernel that adds up the row blocks that programs share.

    Args:
        sums: [groups of tokens, programs, 2, tokens, ROWS] float32.
    """
    assert kernels is not None
    launcher.launch(
        kernels.add_sums_kernel,
        (triton.cdiv(weight.num_rows, ROWS), triton.cdiv(len(y), 8)),
        sums,
        weight.row_norms,
        y if bias is None else bias,
        y,
        len(y),
        weight.num_rows,
        weight.num_inputs,
        int(bias is not None),
        sums.shape[1],
        sums.shape[3],
        DTYPE=TL_DTYPES[y.dtype],
        ROWS=ROWS,
        num_warps=4,
    )
