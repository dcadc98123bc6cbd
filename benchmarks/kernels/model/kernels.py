"""Launches of this project's kernels: which warp decodes which tiles, and what its loads are of."""

import collections
import functools
import re
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.kernels.model.assumptions import KEPT_IN_L2, MULTIPROCESSORS, Machine
from benchmarks.kernels.model.listing import Instruction, Listing, Loop, read_listing
from benchmarks.kernels.model.paths import Step, walk
from benchmarks.kernels.model.simulate import BlockStep, Launch
from benchmarks.kernels.model.trace import NOTHING, Record, Request, Source, record
from benchmarks.kernels.sass import SHARED_BYTES, compile_for
from qamw_kernels.ops.gluon import launch as gluon_launch
from qamw_kernels.ops.triton import kernels as triton_kernels
from qamw_kernels.ops.triton import launch as triton_launch

TARGET = 90
PAIRS = 128  # that one thread decodes in a turn of the main loop: as many look-ups
WORDS_STRIDE = 0x200  # bytes between the words of a lane
ADDRESS = re.compile(r"\[(R\d+)\.64(?:\+(-?0x[0-9a-f]+))?")
PAST_L1 = re.compile(r"STRONG|\.EF|\.NA")


@functools.cache
def decode_listing(index_bits: int, parts: int) -> Listing:
    """Machine code of the decode kernel in bfloat16."""
    assert gluon_launch.kernels is not None
    constants = gluon_launch.constants(index_bits, torch.bfloat16, parts, SHARED_BYTES[TARGET])
    kernel = gluon_launch.kernels.decode_gemm_kernel
    return read_listing(compile_for(TARGET, kernel, constants))


@functools.cache
def rotate_listing(rotation_block_size: int) -> Listing:
    """Machine code of the rotation in bfloat16."""
    constants = triton_launch.rotate_constants(rotation_block_size, torch.bfloat16)
    return read_listing(compile_for(TARGET, triton_kernels.rotate_kernel, constants))


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


def _requests_of_loop(
    body: Iterable[Instruction], parts: int, ahead: int
) -> list[Request]:
    """Of every instruction of a loop that decodes.

    Index words and activations are told apart by their pointers: of the words, all offsets are
    multiples of a stride.

    Args:
        ahead: turns between a prefetch and the use of the tile.
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
        if x.name == "UBLKPF":
            found.append(Request(Source.WORDS, ahead=ahead))
        elif x.name != "LDG":
            found.append(NOTHING)
        elif _pointer(x)[0] in words:
            found.append(Request(Source.WORDS, 512, bypass=bool(PAST_L1.search(x.opcode))))
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


class _Blocks:
    """Stretches of a listing as blocks, each made once."""

    def __init__(self, listing: Listing, requests: list[Request], machine: Machine) -> None:
        self.listing, self.requests, self.machine = listing, requests, machine
        self.numbers: dict[tuple[int, int], int] = {}
        self.blocks: list[list[Record]] = []

    def number(self, step: Step) -> int:
        key = (step.first, step.last)
        if key not in self.numbers:
            self.numbers[key] = len(self.blocks)
            span = range(step.first, step.last + 1)
            code = self.listing.code
            self.blocks.append([record(code[i], self.requests[i], self.machine) for i in span])
        return self.numbers[key]


def _decode_requests(listing: Listing, parts: int) -> list[Request]:
    """Of every instruction of the decode kernel."""
    decoding = _look_ups(listing)
    requests = [NOTHING] * len(listing.code)
    # Prefetched row norms are in L2 when they are loaded; the quadrant is, from the layer before.
    early = any(x.name == "CCTL" for x in listing.code)
    norms = Request(Source.L2 if early else Source.HBM, 64)
    ahead = 0
    for i, x in enumerate(listing.code):
        if x.name == "UBLKPF" and i < decoding[0].first:
            ahead += 1  # before the loop, one prefetch for every turn up to this distance
            requests[i] = Request(Source.WORDS, ahead=ahead)
        elif x.name == "LDG":
            requests[i] = Request(Source.L2, 32) if i < decoding[0].first else norms
    for loop in decoding:
        body = listing.code[loop.first : loop.last + 1]
        requests[loop.first : loop.last + 1] = _requests_of_loop(body, parts, ahead)
    return requests


def decode_launch(
    num_rows: int, num_inputs: int, num_tokens: int, index_bits: int, machine: Machine
) -> Launch:
    """The decode kernel, with the grid that its launcher chooses."""
    parts = gluon_launch.parts_of(num_tokens)
    each = gluon_launch.programs_per_processor(index_bits, parts, SHARED_BYTES[TARGET])
    row_tiles, input_tiles = -(-num_rows // 16), -(-num_inputs // 512)
    log = gluon_launch.log_row_tiles(row_tiles, input_tiles, each * MULTIPROCESSORS)
    runs = -(-row_tiles >> log) if log else row_tiles
    columns = min(runs, each * MULTIPROCESSORS)
    share = gluon_launch.WARPS >> log
    whole = num_inputs // 512 // share * share
    listing = decode_listing(index_bits, parts)
    tiles, rest = _look_ups(listing)
    blocks = _Blocks(listing, _decode_requests(listing, parts), machine)

    @functools.cache
    def steps(first_tile: int, num_runs: int) -> tuple[BlockStep, ...]:
        def trips(loop: Loop, turns: Any) -> int:
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
            found.append(BlockStep(blocks.number(step), 1024 * tile if tile < input_tiles else -1, turn))
        return tuple(found)

    programs = []
    for y in range(-(-num_tokens // (8 * parts))):
        for x in range(columns):
            num_runs = len(range(x, runs, columns))
            warps = [steps(w & (share - 1), num_runs) for w in range(gluon_launch.WARPS)]
            programs.append((y * 8 * parts, warps))
    weight_bytes = row_tiles * input_tiles * index_bits * 512
    return Launch(
        blocks.blocks,
        programs,
        each,
        tokens=num_tokens,
        row_bytes=2 * num_inputs,
        tile_bytes=index_bits * 512,
        resident=weight_bytes <= KEPT_IN_L2,
    )


def rotate_launch(
    num_inputs: int, num_tokens: int, rotation_block_size: int, machine: Machine
) -> Launch:
    """The rotation: activations are in L2; the later half of its loads is of the layer's scales."""
    constants = triton_launch.rotate_constants(rotation_block_size, torch.bfloat16)
    listing = rotate_listing(rotation_block_size)
    requests = [NOTHING] * len(listing.code)
    loads = [i for i, x in enumerate(listing.code) if x.name == "LDG"]
    for n, i in enumerate(loads):
        requests[i] = Request(Source.HBM, 256) if 2 * n >= len(loads) else Request(Source.L2, 256)
    blocks = _Blocks(listing, requests, machine)
    steps = tuple(BlockStep(blocks.number(s), 0, -1) for s in walk(listing, lambda *_: 1))
    rows = -(-num_tokens * num_inputs // rotation_block_size)
    grid = -(-rows // constants["BLOCK_R"]) * (rotation_block_size // constants["WIDTH"])
    return Launch(blocks.blocks, [(0, [steps] * constants["num_warps"])] * grid, 8)


def narrow_launch(
    num_rows: int, num_inputs: int, num_tokens: int, index_bits: int, machine: Machine, listing, warps=16, slots=8
) -> Launch:
    """The kernel for few tokens: half a tile for every warp, one program on a multiprocessor."""
    row_tiles, input_tiles = -(-num_rows // 16), -(-num_inputs // 512)
    slices = -(-input_tiles // (warps // 2))
    batch = slots // slices
    run = -(-row_tiles // MULTIPROCESSORS)
    columns = -(-row_tiles // run)
    decoding = next(
        x
        for x in reversed(listing.loops)
        if listing.count(x, lambda i: i.name == "HMMA") == 16
    )
    batches, sliced = [x for x in listing.loops if x.holds(decoding)]
    requests, ahead, chunk = [NOTHING] * len(listing.code), 0, 0
    for i, x in enumerate(listing.code):
        if x.name == "UBLKPF":
            ahead += i < batches.first
            requests[i] = Request(Source.WORDS, ahead=ahead)
        elif x.name == "LDG" and PAST_L1.search(x.opcode):
            requests[i] = Request(Source.WORDS, 512, bypass=True)
        elif x.name == "LDG" and ".128" in x.opcode:
            # In the loop those of the next slice, in the last turn of this one.
            requests[i] = Request(Source.TOKENS, chunk=chunk % 8)
            chunk += 1
        elif x.name == "LDG" and i < batches.first:
            requests[i] = Request(Source.L2, 32)
        elif x.name == "LDG":
            requests[i] = Request(Source.L2, 64)
    assert chunk == 16, chunk
    # Words that the loop loads for its next turn, and those of the first turn before it.
    carried = any(r.source == Source.WORDS and r.bypass for r in requests[sliced.first : decoding.first])
    if any(r.source == Source.WORDS and r.bypass for r in requests[: decoding.first]):
        for i, r in enumerate(requests):
            if r.source == Source.WORDS and r.bypass:
                requests[i] = r._replace(ahead=1)
    blocks = _Blocks(listing, requests, machine)

    @functools.cache
    def steps(warp: int, own: int) -> tuple[BlockStep, ...]:
        sizes = [min(batch, own - first) for first in range(0, own, batch)]

        def trips(loop: Loop, turns: Any) -> int:
            if loop == batches:
                return len(sizes)
            size = sizes[turns[0][1]] if turns and turns[0][0] == batches else 0
            if loop == sliced:
                return slices
            if loop == decoding:
                return size
            if loop.first > sliced.last:  # writing
                inner = any(x.holds(loop) for x in listing.loops if x.first > sliced.last)
                return slices if inner else -(-size * 128 // (32 * warps))
            return 1

        def offset(s: int) -> int:
            tile = s * (warps // 2) + warp // 2
            return 1024 * tile + 512 * (warp % 2) if tile < input_tiles else -1

        found, turn = [], -1
        for step in walk(listing, trips):
            where = dict(step.turns)
            s = where.get(sliced, 0)
            at = offset(s)
            if decoding in where:
                turn += step.first == decoding.first
                if any(requests[i].source == Source.TOKENS for i in range(step.first, step.last)):
                    renews = slices > 1 and where[decoding] == sizes[where[batches]] - 1
                    at = offset((s + 1) % slices) if renews else -1
            found.append(BlockStep(blocks.number(step), at, turn))
        return tuple(found)

    programs = [
        (0, [steps(w, min(run, row_tiles - x * run)) for w in range(warps)])
        for x in range(columns)
    ]
    return Launch(blocks.blocks, programs, 1, tokens=num_tokens, row_bytes=2 * num_inputs, tile_bytes=index_bits * 256)
