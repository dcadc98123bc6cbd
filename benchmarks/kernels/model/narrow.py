"""Launches of the kernel for up to 8 tokens: what every warp of it decodes, and when."""

import functools

import torch

from benchmarks.kernels.model.assumptions import Machine
from benchmarks.kernels.model.blocks import PROCESSOR, TARGET, TILE_BYTES, Blocks, goes_past_l1
from benchmarks.kernels.model.listing import Listing, Loop, read_listing
from benchmarks.kernels.model.paths import Turns, walk
from benchmarks.kernels.model.simulate import BlockStep, Launch
from benchmarks.kernels.model.trace import NEVER, NOTHING, Request, Source
from benchmarks.kernels.sass import compile_for
from qamw_kernels.ops.gluon import narrow_launch as kernel
from qamw_kernels.ops.weight import Rate

HALF_TILE_PRODUCTS = 16  # matrix instructions of a turn
CHUNKS = 8  # of half a tile


@functools.cache
def narrow_listing(rate: Rate) -> Listing:
    """Machine code of the kernel in bfloat16."""
    constants = kernel.constants(rate, torch.bfloat16, PROCESSOR)
    return read_listing(compile_for(TARGET, kernel.kernel, constants))


def _nest(listing: Listing) -> tuple[Loop, Loop, Loop]:
    """The loops over batches of row tiles, over slices of the inputs, and over row tiles."""
    products = [
        x
        for x in listing.loops
        if listing.count(x, lambda i: i.name == "HMMA") == HALF_TILE_PRODUCTS
    ]
    batches, slices, turns = products
    assert batches.holds(slices) and slices.holds(turns)
    return batches, slices, turns


def _requests(listing: Listing) -> list[Request]:
    """The request of every instruction.

    The words of a turn are loaded in the turn before, those of the first before the loops.
    Prefetches come in pairs, of a whole tile and of half of one, which the layers here do not have.
    """
    requests, prefetches, chunk = [NOTHING] * len(listing.code), 0, 0
    for i, x in enumerate(listing.code):
        if x.name == "UBLKPF":
            # A turn ahead: a pair before the loops, and one in them.
            requests[i] = Request(Source.WORDS, ahead=NEVER if prefetches % 2 else 1)
            prefetches += 1
        elif x.name == "LDG" and goes_past_l1(x):
            requests[i] = Request(Source.WORDS, 512, ahead=1, bypass=True)
        elif x.name == "LDG" and ".128" in x.opcode:
            requests[i] = Request(Source.TOKENS, chunk=chunk % CHUNKS)
            chunk += 1
        elif x.name == "LDG":  # entries; row norms, which were prefetched, and no bias
            requests[i] = Request(Source.L2, 32)
    assert prefetches == 4
    assert chunk == 2 * CHUNKS, "activations before the loops, and in the last turn of a slice"
    return requests


def narrow_launch(
    num_rows: int, num_inputs: int, num_tokens: int, rate: Rate, machine: Machine
) -> Launch:
    """The kernel, with the grid that its launcher chooses."""
    row_tiles, input_tiles = -(-num_rows // 16), -(-num_inputs // 512)
    slices = kernel.slices(input_tiles)
    batch = kernel.slots(rate, PROCESSOR.shared_memory) // slices
    run = -(-row_tiles // PROCESSOR.multiprocessors)
    listing = narrow_listing(rate)
    batches, sliced, decoding = _nest(listing)
    requests = _requests(listing)
    blocks = Blocks(listing, requests, machine)

    @functools.cache
    def steps(warp: int, own: int) -> tuple[BlockStep, ...]:
        """The steps of a warp whose program has ``own`` row tiles."""
        sizes = [min(batch, own - first) for first in range(0, own, batch)]

        def trips(loop: Loop, turns: Turns) -> int:
            size = sizes[dict(turns).get(batches, 0)]
            if loop == decoding:
                return size
            if loop.first > sliced.last:  # adding up; in a turn, every thread adds one sum
                adds = not any(loop.holds(other) for other in listing.loops)
                return slices if adds else -(-size * 128 // (32 * kernel.WARPS))
            return {batches: len(sizes), sliced: slices}.get(loop, 1)

        def offset(s: int) -> int:
            tile = s * kernel.SLICE_TILES + warp // 2
            half = TILE_BYTES // 2 * (warp % 2)
            return TILE_BYTES * tile + half if tile < input_tiles else -1

        found, turn = [], -1
        for step in walk(listing, trips):
            where = dict(step.turns)
            s = where.get(sliced, 0)
            at = offset(s)
            if decoding in where:
                turn += step.first == decoding.first
                span = range(step.first, step.last + 1)
                if any(requests[i].source == Source.TOKENS for i in span):
                    renews = slices > 1 and where[decoding] == sizes[where[batches]] - 1
                    at = offset((s + 1) % slices) if renews else -1
            found.append(BlockStep(blocks.number(step), at, turn))
        return tuple(found)

    programs = [
        (0, [steps(w, min(run, row_tiles - first)) for w in range(kernel.WARPS)])
        for first in range(0, row_tiles, run)
    ]
    return Launch(
        blocks.records,
        programs,
        programs_each=1,
        tokens=num_tokens,
        row_bytes=2 * num_inputs,
        tile_bytes=rate.index_bits * 256,  # two warps ask for a tile
    )
