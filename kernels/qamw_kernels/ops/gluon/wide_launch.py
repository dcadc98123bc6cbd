"""Launcher of the Gluon kernel for up to 1024 tokens.

It needs compute capability 9.0, and a Triton that can compile the kernel: 3.7.1 or newer.
"""

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch

from qamw_kernels.ops.gluon import table
from qamw_kernels.ops.launcher import TL_DTYPES, Launcher, Processor, cdiv
from qamw_kernels.ops.tiling import TILE_INPUTS, TILE_ROWS
from qamw_kernels.ops.weight import Rate, TiledWeight

MAX_TOKENS = 1024
"""With so many, the layers of a block of Llama-3-8B take 763 us on an H100, and about 921 us if the
weights are decoded first; see benchmarks/kernels/results/h100.json."""
RESERVED = 1024  # bytes of shared memory that the driver takes for every program
PLACES = 2  # in shared memory for blocks of activations: one is multiplied, the other arrives
ADDED_ROWS = 32  # by a program of the kernel that adds up


class Tile(NamedTuple):
    """How a program multiplies.

    Attributes:
        log_warps: log2 of its warps.
        programs: on a multiprocessor, where their shared memory fits.
    """

    log_warps: int
    programs: int = 1


TILES = {
    16: Tile(3, programs=2),
    32: Tile(3, programs=2),
    64: Tile(4),
    128: Tile(4),
    256: Tile(3),
}
"""By the tokens that a program has: the fastest of those that were measured on an H100.

With 16 warps on a multiprocessor, a thread has 128 registers. Where these are too few, compilers
spill values that are read once per tile or less often.
"""

SPILLING = (12, 128)
"""Bits of an index, and tokens, with which 16 warps would spill what every stage of a tile reads.

There a thread has 12 words beside 64 sums. With half as many warps it has twice the registers.
"""

ADDING_UNITS = 1
"""What it costs to add up row blocks that programs share, in units of a program's work."""


def load(name: str) -> ModuleType | None:
    """A module beside this one, where its kernels can be compiled."""
    if not table.HAS_GATHER:
        return None
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ImportError:
        return None


kernels, sums_kernels = load("wide_kernels"), load("sums_kernels")


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
    """The share with which the busiest of at most ``programs`` programs ends earliest."""
    most = cdiv(row_blocks * input_tiles, programs)  # units of a program
    if cdiv(row_blocks, programs) * input_tiles <= most + ADDING_UNITS:
        return Share(min(programs, row_blocks), input_tiles)
    return Share(cdiv(row_blocks * input_tiles, most), 1)  # no more programs than needed


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


class Shape(NamedTuple):
    """The shape of a program.

    Attributes:
        tile: how it multiplies.
        rows: of a row block.
        block_inputs: inputs of a block of activations, half of a tile's or fewer.
    """

    tile: Tile
    rows: int
    block_inputs: int


def tokens_of(num_tokens: int) -> int:
    """Tokens that one program has."""
    return next((tokens for tokens in TILES if num_tokens <= tokens), max(TILES))


@functools.cache
def shape_of(rate: Rate, tokens: int, shared_memory: int) -> Shape:
    """The shape of the programs that have so many tokens.

    Args:
        shared_memory: bytes that one program may have, if it is alone on its multiprocessor.
    """
    tile = Tile(3) if (rate.index_bits, tokens) == SPILLING else TILES[tokens]
    inputs = _inputs_beside_table(rate, tokens, tile.programs, shared_memory)
    if tile.programs > 1 and inputs < TILE_INPUTS:
        tile = tile._replace(programs=1)
        inputs = _inputs_beside_table(rate, tokens, 1, shared_memory)
    block_inputs = min(inputs, TILE_INPUTS) // PLACES
    return Shape(tile, TILE_ROWS << tile.log_warps, block_inputs)


def _inputs_beside_table(rate: Rate, tokens: int, programs: int, shared_memory: int) -> int:
    """Inputs, a power of 2, whose activations fit beside the table if ``programs`` share memory."""
    free = (shared_memory + RESERVED) // programs - RESERVED
    free -= table.table_bytes(rate, shared_memory) + 8 * PLACES
    return 1 << max(free // (2 * tokens), 1).bit_length() - 1


@functools.lru_cache(maxsize=4096)
def grid(
    num_tokens: int, num_rows: int, input_tiles: int, rate: Rate, processor: Processor
) -> Grid:
    """The programs that multiply so many tokens with a weight."""
    tokens = tokens_of(num_tokens)
    shape = shape_of(rate, tokens, processor.shared_memory)
    programs = shape.tile.programs * processor.multiprocessors
    groups = cdiv(num_tokens, tokens)
    row_blocks = cdiv(num_rows, shape.rows)
    share = share_out(row_blocks, input_tiles, max(programs // groups, 1))
    return Grid(tokens, groups, share, share.grain < input_tiles and share.programs > 1)


@functools.cache
def constants(
    rate: Rate,
    dtype: torch.dtype,
    tokens: int,
    shared_memory: int,
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and options of its compiler.

    Args:
        tokens: of one program.
        shared_memory: bytes that one program may have.
    """
    shape = shape_of(rate, tokens, shared_memory)
    tile, warps = shape.tile, 1 << shape.tile.log_warps
    return {
        **table.rate_constants(rate, shared_memory),
        "DTYPE": TL_DTYPES[dtype],
        "TOKENS": tokens,
        "BLOCK_INPUTS": shape.block_inputs,
        "PLACES": PLACES,
        "WARPS": warps,
        "num_warps": warps,
        "maxnreg": table.registers(warps * tile.programs),
        "launch_pdl": True,
    }


@functools.cache
def descriptor_layout(block_shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """How blocks of activations lie in shared memory: in the order that the matrix unit reads."""
    from triton.experimental.gluon import language as gl

    gl_dtype = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block_shape), gl_dtype)


def fits(
    num_tokens: int,
    num_inputs: int,
    dtype: torch.dtype,
    rate: Rate,
    processor: Processor | None,
) -> bool:
    """Whether the kernel runs on a processor, with any number of inputs and M * N < 2**31."""
    hopper = processor is not None and processor.compute_capability == 90
    return hopper and kernels is not None and table.fits(dtype, rate, processor)


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
    input_tiles, rate = weight.tiles.shape[1], weight.rate
    tokens, groups, share, adds = grid(num_tokens, num_rows, input_tiles, rate, processor)
    chosen = constants(rate, rotated.dtype, tokens, processor.shared_memory)
    shape = shape_of(rate, tokens, processor.shared_memory)
    sums = weight.row_norms  # of the right type; nothing is written to it
    if adds:
        places = (groups, share.programs, 2, tokens * shape.rows)
        sums = torch.empty(places, dtype=torch.float32, device=y.device)
    block_shape = (tokens, shape.block_inputs)
    layout = descriptor_layout(block_shape, rotated.dtype)
    launcher.launch(
        kernels.wide_gemm_kernel,
        (share.programs, groups),
        weight.tiles,
        TensorDescriptor.from_tensor(rotated, list(block_shape), layout),
        weight.row_norms,
        weight.entry_words,
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
        add_sums(sums, tokens, shape, weight, bias, y, launcher)


def sum_constants(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of the kernel that adds up, and options of its compiler."""
    options = {"num_warps": 8, "launch_pdl": True}
    return {"DTYPE": TL_DTYPES[dtype], "ROWS": ADDED_ROWS, **options}


def add_sums(
    sums: torch.Tensor,
    tokens: int,
    shape: Shape,
    weight: TiledWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    launcher: Launcher,
) -> None:
    """Launch the kernel that adds up the row blocks that programs share.

    Args:
        sums: [groups of tokens, programs, 2, tokens * rows of a block] float32.
        tokens, shape: of the programs.
    """
    assert sums_kernels is not None
    launcher.launch(
        sums_kernels.add_sums_kernel,
        (cdiv(weight.num_rows, ADDED_ROWS), cdiv(len(y), 16)),
        sums,
        weight.row_norms,
        y if bias is None else bias,
        y,
        len(y),
        weight.num_rows,
        weight.num_inputs,
        int(bias is not None),
        sums.shape[1],
        tokens,
        1 << shape.tile.log_warps,
        **sum_constants(y.dtype),
    )
