"""Launches of the kernel for up to 1024 tokens: what every warp of it decodes, and when."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.kernels.model.assumptions import Machine
from benchmarks.kernels.model.blocks import PROCESSOR, TARGET, Blocks, goes_past_l1
from benchmarks.kernels.model.listing import Instruction, Listing, Loop, read_listing
from benchmarks.kernels.model.paths import Step, Turns, walk
from benchmarks.kernels.model.simulate import BlockStep, Launch
from benchmarks.kernels.model.trace import NOTHING, Request, Source, width
from benchmarks.kernels.sass import compile_for
from qamw_kernels.ops.gluon import routed_launch
from qamw_kernels.ops.gluon import wide_launch as kernel
from qamw_kernels.ops.tiling import TILE_INPUTS
from qamw_kernels.ops.weight import Rate

PAIRS = 128  # that one thread decodes of a tile: as many look-ups
WORD_BYTES = 512  # of a warp's load


@functools.cache
def wide_listing(rate: Rate, tokens: int) -> Listing:
    """Machine code of the kernel in bfloat16, for programs of so many tokens.

    The code of long waits is behind the loop over row blocks and branches back: it is left out.
    """
    assert kernel.kernels is not None
    return _listing_of(kernel.kernels.wide_gemm_kernel, rate, tokens)


@functools.cache
def routed_wide_listing(rate: Rate, slots: int) -> Listing:
    """The same of the kernel for mixtures of experts, for blocks of so many slots."""
    assert routed_launch.wide_kernels is not None
    return _listing_of(routed_launch.wide_kernels.routed_wide_gemm_kernel, rate, slots)


def _listing_of(jit_function: Any, rate: Rate, tokens: int) -> Listing:
    constants = kernel.constants(rate, torch.bfloat16, tokens, PROCESSOR.shared_memory)
    listing = read_listing(compile_for(TARGET, jit_function, constants))
    end = _decoding(listing)[0].last
    return Listing(listing.code[: end + 1], tuple(x for x in listing.loops if x.last <= end))


def _decoding(listing: Listing) -> list[Loop]:
    """The loops that decode a whole unit, outermost first."""

    def looks_up(instruction: Instruction) -> bool:
        return instruction.name == "LDS"

    return [x for x in listing.loops if listing.count(x, looks_up) >= PAIRS]


def _nest(listing: Listing) -> tuple[Loop, Loop]:
    """The loops over row blocks, and over the units of one."""
    row_blocks, units = _decoding(listing)
    assert row_blocks.holds(units)
    return row_blocks, units


def _requests(listing: Listing, rate: Rate, copy_bytes: int) -> list[Request]:
    """The request of every instruction.

    A turn is a unit, of which a warp has one tile. The words of the tile's first quarter are loaded
    in the turn before, as the last ones of that turn. All are brought to L2 one turn before; those
    of the first unit before the loops, where the turn is -1.

    Args:
        copy_bytes: of a block of activations.
    """
    assert kernel.kernels is not None
    row_blocks, units = _nest(listing)
    requests, prefetches, loads = [NOTHING] * len(listing.code), 0, 0
    quarters = [kernel.kernels.first_quarter(j, rate.entry_bits) for j in range(rate.index_bits)]
    own = rate.index_bits - quarters.count(0)
    for i, x in enumerate(listing.code):
        if x.name == "UTMALDG":
            requests[i] = Request(Source.L2, copy_bytes)
        elif x.name == "UBLKPF":
            prefetches += 1
            requests[i] = Request(Source.WORDS, ahead=prefetches - (i > row_blocks.first))
        elif x.name == "LDG" and goes_past_l1(x):
            loads += i > units.first
            ahead = i < units.first or loads > own
            requests[i] = Request(Source.WORDS, WORD_BYTES, ahead=int(ahead), bypass=True)
        elif x.name == "LDG":  # entries; row norms, which were prefetched, and no bias
            requests[i] = Request(Source.L2, 32)
        elif x.name == "STG":  # y, or sums that another kernel adds up
            requests[i] = Request(Source.L2, max(32 * width(x), 128))
    assert (prefetches, loads) == (2, rate.index_bits)
    return requests


def _endings(listing: Listing) -> tuple[range, range]:
    """What a program executes after a row block: one that it has alone, and one that it shares."""
    outer, inner = _nest(listing)
    after = range(inner.last + 1, outer.last)
    code = listing.code
    stores = {i: width(code[i]) for i in after if code[i].name == "STG"}
    to_y = [i for i, size in stores.items() if size == 2]
    to_sums = [i for i, size in stores.items() if size == 16]
    assert to_y and to_sums and to_y[-1] < to_sums[0], "the endings are in another order"
    branches = [i for i in after if code[i].opcode == "BRA"]
    first = max(i for i in branches if code[i].predicate and i < to_y[0]) + 1
    last = min(i for i in branches if not code[i].predicate and i > to_y[-1])
    return range(first, last + 1), range(last + 1, to_sums[-1] + 1)


def _cut(steps: Iterable[Step], edges: Iterable[int]) -> Iterator[Step]:
    """The steps, cut at the edges."""
    edges = sorted(edges)
    for step in steps:
        inside = [edge for edge in edges if step.first < edge <= step.last]
        for first, after in itertools.pairwise((step.first, *inside, step.last + 1)):
            yield Step(first, after - 1, step.turns)


def _units_by_row_block(first: int, last: int, input_tiles: int) -> list[int]:
    """How many of the units first .. last - 1 are in each of their row blocks."""
    starts = range(first - first % input_tiles, last, input_tiles)
    return [min(last, start + input_tiles) - max(first, start) for start in starts]


def _grid(num_rows: int, num_inputs: int, num_tokens: int, rate: Rate) -> kernel.Grid:
    input_tiles = -(-num_inputs // TILE_INPUTS)
    return kernel.grid(num_tokens, num_rows, input_tiles, rate, PROCESSOR)


def wide_launch(
    num_rows: int, num_inputs: int, num_tokens: int, rate: Rate, machine: Machine
) -> Launch:
    """The kernel, with the grid that its launcher chooses."""
    grid = _grid(num_rows, num_inputs, num_tokens, rate)
    shape = kernel.shape_of(rate, grid.tokens, PROCESSOR.shared_memory)
    input_tiles = -(-num_inputs // TILE_INPUTS)
    listing = wide_listing(rate, grid.tokens)
    outer, inner = _nest(listing)
    copy_bytes = 2 * grid.tokens * shape.block_inputs
    requests = _requests(listing, rate, copy_bytes)
    blocks = Blocks(listing, requests, machine)
    endings = _endings(listing)  # where a row block is whole, the second is left out
    edges = {edge for ending in endings for edge in (ending.start, ending.stop)}

    @functools.cache
    def steps(sizes: tuple[int, ...]) -> tuple[BlockStep, ...]:
        """The steps of every warp of a program that has ``sizes`` units of its row blocks."""

        def trips(loop: Loop, turns: Turns) -> int:
            if loop == inner:
                return sizes[dict(turns)[outer]]
            return len(sizes) if loop == outer else 1  # such as that of a wait

        found, turn = [], -1
        for step in _cut(walk(listing, trips), edges):
            turn += step.first == inner.first
            where = dict(step.turns)
            whole = sizes[where.get(outer, 0)] == input_tiles
            if step.first not in endings[whole]:
                offset = 0 if inner in where else -1
                found.append(BlockStep(blocks.number(step), offset, turn))
        return tuple(found)

    units = -(-num_rows // shape.rows) * input_tiles
    programs, grain = grid.share
    firsts = [program * (units // grain) // programs * grain for program in range(programs + 1)]
    warps = [
        [steps(tuple(_units_by_row_block(first, last, input_tiles)))] * (1 << shape.tile.log_warps)
        for first, last in itertools.pairwise(firsts)
    ]
    return Launch(
        blocks.records,
        [(group * grid.tokens, own) for group in range(grid.groups) for own in warps],
        programs_each=shape.tile.programs,
        tokens=num_tokens,
        row_bytes=2 * num_inputs,
        tile_bytes=rate.index_bits * WORD_BYTES,
        copies_each=TILE_INPUTS / shape.block_inputs,
        token_blocks=grid.groups,
        ready=machine.dependent_end,
    )


def routed_wide_launch(
    shape: tuple[int, int],
    slots: Sequence[int],
    block_size: int,
    rate: Rate,
    machine: Machine,
) -> Launch:
    """The kernel for mixtures of experts, with the grid that its launcher chooses.

    HBM is asked for an expert's weight once for each of its blocks of slots: most have one.

    Args:
        shape: of an expert's matrix.
        slots: of every expert.
    """
    (num_rows, num_inputs), blocks_of_slots = shape, sum(-(-n // block_size) for n in slots)
    program = kernel.shape_of(rate, block_size, PROCESSOR.shared_memory)
    input_tiles = -(-num_inputs // TILE_INPUTS)
    listing = routed_wide_listing(rate, block_size)
    outer, inner = _nest(listing)
    requests = _requests(listing, rate, 2 * block_size * program.block_inputs)
    blocks = Blocks(listing, requests, machine)

    @functools.cache
    def steps(runs: int) -> tuple[BlockStep, ...]:
        """The steps of every warp of a program that has ``runs`` row blocks."""

        def trips(loop: Loop, turns: Turns) -> int:
            return {outer: runs, inner: input_tiles}.get(loop, 1)

        found, turn = [], -1
        for step in walk(listing, trips):
            turn += step.first == inner.first
            offset = 0 if inner in dict(step.turns) else -1
            found.append(BlockStep(blocks.number(step), offset, turn))
        return tuple(found)

    runs = blocks_of_slots * -(-num_rows // program.rows)
    programs = min(program.tile.programs * PROCESSOR.multiprocessors, runs)
    shares = [runs // programs + (i < runs % programs) for i in range(programs)]
    return Launch(
        blocks.records,
        [(0, [steps(share)] * (1 << program.tile.log_warps)) for share in shares],
        programs_each=program.tile.programs,
        tokens=block_size,
        row_bytes=2 * num_inputs,
        tile_bytes=rate.index_bits * WORD_BYTES,
        copies_each=TILE_INPUTS / program.block_inputs,
        ready=machine.dependent_end,
    )


@functools.cache
def _adding_listing() -> Listing:
    """Machine code of the kernel that adds up, in bfloat16."""
    assert kernel.sums_kernels is not None
    constants = kernel.sum_constants(torch.bfloat16)
    return read_listing(compile_for(TARGET, kernel.sums_kernels.add_sums_kernel, constants))


def adding_launch(
    num_rows: int, num_inputs: int, num_tokens: int, rate: Rate, machine: Machine
) -> Launch | None:
    """The kernel that adds up the row blocks that programs share, where there are any."""
    grid = _grid(num_rows, num_inputs, num_tokens, rate)
    if not grid.adds:
        return None
    rows = kernel.shape_of(rate, grid.tokens, PROCESSOR.shared_memory).rows
    listing = _adding_listing()
    requests = [NOTHING] * len(listing.code)
    for i, x in enumerate(listing.code):
        if x.name in ("LDG", "STG"):
            requests[i] = Request(Source.L2, 32 * width(x))
    blocks = Blocks(listing, requests, machine)
    if_none = next(i for i, x in enumerate(listing.code) if x.opcode == "EXIT")
    input_tiles, programs = -(-num_inputs // TILE_INPUTS), grid.share.programs
    warps = kernel.sum_constants(torch.bfloat16)["num_warps"]
    units = -(-num_rows // rows) * input_tiles

    @functools.cache
    def steps(row_block: int) -> tuple[BlockStep, ...]:
        """The steps of every warp of a program that adds up rows of a row block, a part per warp.

        A row block that one program had alone has nothing to add up.
        """
        start = row_block * input_tiles
        parts = {((unit + 1) * programs - 1) // units for unit in (start, start + input_tiles - 1)}
        turns = -(-(max(parts) - min(parts) + 1) // warps)
        walked = _cut(walk(listing, lambda *_: turns), {if_none + 1})
        taken = walked if len(parts) > 1 else itertools.takewhile(lambda s: s.first == 0, walked)
        return tuple(BlockStep(blocks.number(s), 0, -1) for s in taken)

    return Launch(
        blocks.records,
        [
            (0, [steps(first // rows)] * warps)
            for first in range(0, num_rows, kernel.ADDED_ROWS)
            for _ in range(0, num_tokens, 16)
        ],
        programs_each=64 // warps,
        ready=machine.dependent_end,
    )
