"""Launches of the decode kernel: which warp decodes which tiles, and what its loads are of."""

import collections
import functools
import re
from collections.abc import Iterable

import torch

from benchmarks.kernels.model.assumptions import KEPT_IN_L2, MULTIPROCESSORS, Machine
from benchmarks.kernels.model.blocks import TARGET, TILE_BYTES, Blocks, goes_past_l1
from benchmarks.kernels.model.listing import Instruction, Listing, Loop, read_listing
from benchmarks.kernels.model.paths import Turns, walk
from benchmarks.kernels.model.simulate import BlockStep, Launch
from benchmarks.kernels.model.trace import NOTHING, Request, Source
from benchmarks.kernels.sass import SHARED_BYTES, compile_for
from qamw_kernels.ops.gluon import decode_launch as kernel

PAIRS = 128  # that one thread decodes in a turn of the main loop: as many look-ups
WORDS_STRIDE = 0x200  # bytes between the words of a lane
ADDRESS = re.compile(r"\[(R\d+)\.64(?:\+(-?0x[0-9a-f]+))?")


@functools.cache
def decode_listing(index_bits: int, parts: int) -> Listing:
    """Machine code of the decode kernel in bfloat16."""
    constants = kernel.constants(index_bits, torch.bfloat16, parts, SHARED_BYTES[TARGET])
    return read_listing(compile_for(TARGET, kernel.kernel, constants))


def _look_ups(listing: Listing) -> list[Loop]:
    """The loops that decode, whole tiles first and then those that may be cut off."""

    def looks_up(instruction: Instruction) -> bool:
        return instruction.name == "LDS"

    found = [loop for loop in listing.loops if listing.count(loop, looks_up) == PAIRS]
    return [x for x in found if not any(x.holds(y) for y in found)]


def _pointer(instruction: Instruction) -> tuple[str, int]:
    """Register and offset of a load's address."""
    found = ADDRESS.search(instruction.operands)
    assert found, instruction.operands
    return found[1], int(found[2] or "0", 16)


def _requests_of_loop(body: Iterable[Instruction], parts: int) -> list[Request]:
    """Of every instruction of a loop that decodes.

    Index words and activations are told apart by their pointers: of the words, all offsets are
    multiples of a stride.
    """
    body = list(body)
    offsets: dict[str, list[int]] = collections.defaultdict(list)
    for x in body:
        if x.name == "LDG":
            offsets[_pointer(x)[0]].append(_pointer(x)[1])
    words = {r for r, o in offsets.items() if len(o) > 3 and not any(v % WORDS_STRIDE for v in o)}
    tokens = [register for register in offsets if register not in words]
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for x in body:
        if x.name != "LDG":
            found.append(NOTHING)
        elif _pointer(x)[0] in words:
            found.append(Request(Source.WORDS, 512, bypass=goes_past_l1(x)))
        else:
            register, offset = _pointer(x)
            distinct = sorted(set(offsets[register]))
            # Where the pointer moves inside the loop, chunks come in order.
            chunk = distinct.index(offset) if len(distinct) == 16 else seen[register]
            part = tokens.index(register) % parts
            found.append(Request(Source.TOKENS, part=part, chunk=chunk % 16))
            seen[register] += 1
    assert sum(r.source == Source.TOKENS for r in found) == 16 * parts, offsets
    return found


def _decode_requests(listing: Listing, parts: int) -> list[Request]:
    """Of every instruction of the decode kernel."""
    decoding = _look_ups(listing)
    requests = [NOTHING] * len(listing.code)
    for i, x in enumerate(listing.code):
        if x.name == "LDG":  # the quadrant, which is in L2 since the layer before; row norms
            source = Source.L2 if i < decoding[0].first else Source.HBM
            requests[i] = Request(source, 32)
    for loop in decoding:
        body = listing.code[loop.first : loop.last + 1]
        requests[loop.first : loop.last + 1] = _requests_of_loop(body, parts)
    return requests


def decode_launch(
    num_rows: int, num_inputs: int, num_tokens: int, index_bits: int, machine: Machine
) -> Launch:
    """The decode kernel, with the grid that its launcher chooses."""
    parts = kernel.parts_of(num_tokens)
    each = kernel.programs_per_processor(index_bits, parts, SHARED_BYTES[TARGET])
    row_tiles, input_tiles = -(-num_rows // 16), -(-num_inputs // 512)
    log = kernel.log_row_tiles(row_tiles, input_tiles, each * MULTIPROCESSORS)
    runs = -(-row_tiles >> log) if log else row_tiles
    columns = min(runs, each * MULTIPROCESSORS)
    share = kernel.WARPS >> log
    whole = num_inputs // 512 // share * share
    listing = decode_listing(index_bits, parts)
    tiles, rest = _look_ups(listing)
    blocks = Blocks(listing, _decode_requests(listing, parts), machine)

    @functools.cache
    def steps(first_tile: int, num_runs: int) -> tuple[BlockStep, ...]:
        def trips(loop: Loop, turns: Turns) -> int:
            if loop == tiles:
                return whole // share
            if loop == rest:
                return -(-(input_tiles - whole) // share)
            if loop.holds(tiles):
                return num_runs
            return 1 << log if loop.first > rest.last else 1  # of writing, or of waiting

        found, turn = [], -1
        for step in walk(listing, trips):
            tile = 0
            loop, n = step.turns[-1] if step.turns else (None, 0)
            if loop in (tiles, rest):
                tile = first_tile + n * share + (whole if loop == rest else 0)
                turn += step.first == loop.first
            found.append(
                BlockStep(
                    blocks.number(step), TILE_BYTES * tile if tile < input_tiles else -1, turn
                )
            )
        return tuple(found)

    programs = []
    for y in range(-(-num_tokens // (8 * parts))):
        for x in range(columns):
            num_runs = len(range(x, runs, columns))
            warps = [steps(w & (share - 1), num_runs) for w in range(kernel.WARPS)]
            programs.append((y * 8 * parts, warps))
    weight_bytes = row_tiles * input_tiles * index_bits * 512
    return Launch(
        blocks.records,
        programs,
        each,
        tokens=num_tokens,
        row_bytes=2 * num_inputs,
        tile_bytes=index_bits * 512,
        resident=weight_bytes <= KEPT_IN_L2,
    )
