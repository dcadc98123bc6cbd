"""Launches of the kernel for up to 512 tokens: what every warp of it decodes, and when."""

import functools
import itertools

import torch

from benchmarks.kernels.model.assumptions import KEPT_IN_L2, Machine
from benchmarks.kernels.model.blocks import PROCESSOR, TARGET, Blocks, goes_past_l1
from benchmarks.kernels.model.listing import Instruction, Listing, Loop, read_listing
from benchmarks.kernels.model.paths import Turns, walk
from benchmarks.kernels.model.simulate import BlockStep, Launch
from benchmarks.kernels.model.trace import NOTHING, Request, Source
from benchmarks.kernels.sass import compile_for
from qamw_kernels.ops.gluon import wide_launch as kernel
from qamw_kernels.ops.tiling import TILE_INPUTS

PAIRS = 128  # that one thread decodes of a unit: as many look-ups
WORD_BYTES = 512  # of a warp's load


@functools.cache
def wide_listing(index_bits: int, tokens: int) -> Listing:
    """Machine code of the kernel in bfloat16, for programs of so many tokens.

    Waits that take long go on behind the loop over row blocks, and branch back: these are left out.
    """
    assert kernel.kernels is not None
    constants = kernel.constants(index_bits, torch.bfloat16, tokens, PROCESSOR.shared_memory)
    listing = read_listing(compile_for(TARGET, kernel.kernels.wide_gemm_kernel, constants))
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


def _requests(listing: Listing, copy_bytes: int) -> list[Request]:
    """Of every instruction; the words of a unit are loaded in the unit before.

    Args:
        copy_bytes: of a block of activations.
    """
    row_blocks, _ = _nest(listing)
    requests = [NOTHING] * len(listing.code)
    for i, x in enumerate(listing.code):
        if x.name == "UTMALDG":
            requests[i] = Request(Source.L2, copy_bytes)
        elif x.name == "LDG" and ".128" in x.opcode and (i >= row_blocks.first or goes_past_l1(x)):
            bypass = goes_past_l1(x)
            requests[i] = Request(Source.WORDS, WORD_BYTES, ahead=1, bypass=bypass)
        elif x.name == "LDG":  # the quadrant; row norms, and no bias
            source = Source.L2 if i < row_blocks.first else Source.HBM
            requests[i] = Request(source, 32)
        elif x.name == "STG":  # y, or sums that another kernel adds up
            requests[i] = Request(Source.L2, 128)
    return requests


def _units_by_row_block(first: int, last: int, input_tiles: int) -> list[int]:
    """How many of the units first .. last - 1 are in each of their row blocks."""
    starts = range(first - first % input_tiles, last, input_tiles)
    return [min(last, start + input_tiles) - max(first, start) for start in starts]


def _grid(num_rows: int, num_inputs: int, num_tokens: int, index_bits: int) -> kernel.Grid:
    input_tiles = -(-num_inputs // TILE_INPUTS)
    return kernel.grid(num_tokens, num_rows, input_tiles, index_bits, PROCESSOR)


def wide_launch(
    num_rows: int, num_inputs: int, num_tokens: int, index_bits: int, machine: Machine
) -> Launch:
    """The kernel, with the grid that its launcher chooses."""
    grid = _grid(num_rows, num_inputs, num_tokens, index_bits)
    tokens, shared_memory = grid.tokens, PROCESSOR.shared_memory
    each = kernel.programs_per_processor(index_bits, tokens, shared_memory)
    inputs = kernel.block_inputs(index_bits, tokens, each, shared_memory)
    listing = wide_listing(index_bits, tokens)
    outer, inner = _nest(listing)
    blocks = Blocks(listing, _requests(listing, 2 * tokens * inputs), machine)

    @functools.cache
    def steps(sizes: tuple[int, ...]) -> tuple[BlockStep, ...]:
        """Of every warp of a program that has so many units of each of its row blocks."""

        def trips(loop: Loop, turns: Turns) -> int:
            if loop == inner:
                return sizes[dict(turns)[outer]]
            return len(sizes) if loop == outer else 1  # such as that of a wait

        found, turn = [], -1
        for step in walk(listing, trips):
            decoding = inner in dict(step.turns)
            turn += decoding and step.first == inner.first
            found.append(BlockStep(blocks.number(step), 0 if decoding else -1, turn))
        return tuple(found)

    input_tiles = -(-num_inputs // TILE_INPUTS)
    units = -(-num_rows // kernel.ROWS) * input_tiles
    programs, grain = grid.share
    edges = [program * (units // grain) // programs * grain for program in range(programs + 1)]
    warps = [
        [steps(tuple(_units_by_row_block(first, last, input_tiles)))] * kernel.WARPS
        for first, last in itertools.pairwise(edges)
    ]
    return Launch(
        blocks.records,
        [(group * tokens, own) for group in range(grid.groups) for own in warps],
        programs_each=each,
        tokens=num_tokens,
        row_bytes=2 * num_inputs,
        resident=num_rows * num_inputs * index_bits / 16 <= KEPT_IN_L2,
    )


def adding_seconds(
    num_rows: int, num_inputs: int, num_tokens: int, index_bits: int, machine: Machine
) -> float:
    """Of the kernel that adds up the row blocks that programs share, with the gap before it.

    It is not replayed: it takes a program's start, three waits for L2 one after the other (sums,
    row norms, y), and its traffic at the speed of L2.
    """
    grid = _grid(num_rows, num_inputs, num_tokens, index_bits)
    if not grid.adds:
        return 0.0
    sums = grid.groups * grid.share.programs * 2 * grid.tokens * kernel.ROWS * 4
    cycles = machine.program_start + 3 * machine.l2_latency
    return machine.launch_gap + cycles / machine.clock + sums / machine.l2_bandwidth
