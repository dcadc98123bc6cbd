"""Products of a mixture of experts: what every warp of a launch decodes, and when."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch

from benchmarks.kernels.mixture import Mixture
from benchmarks.kernels.model.assumptions import BF16_FIXED, BF16_FLOPS, Gpu, Machine
from benchmarks.kernels.model.blocks import PROCESSOR, TARGET, TILE_BYTES, Blocks, goes_past_l1
from benchmarks.kernels.model.listing import Instruction, Listing, Loop, read_listing
from benchmarks.kernels.model.narrow import CHUNKS, HALF_TILE_PRODUCTS
from benchmarks.kernels.model.paths import Turns, walk
from benchmarks.kernels.model.simulate import BlockStep, Launch, Outcome, simulate
from benchmarks.kernels.model.trace import NEVER, NOTHING, Request, Source
from benchmarks.kernels.sass import compile_for
from qamw_kernels.ops.gluon import narrow_launch, routed_launch
from qamw_kernels.ops.weight import Rate

PARTS = 12
"""Of a large launch only every 12th program is replayed, on a 12th of the multiprocessors with a
12th of the bandwidth: all programs have equally much to do."""
WHOLE_TURNS = 10
"""Launches whose programs have fewer turns are replayed whole: there the slowest one counts."""


@functools.cache
def slots_of_experts(mixture: Mixture, num_tokens: int, seed: int = 0) -> list[int]:
    """Slots of every expert, if each token is sent to random experts, all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, mixture.experts, generator=generator)
    chosen = scores.topk(mixture.top_k, 1).indices.flatten()
    return torch.bincount(chosen, minlength=mixture.experts).tolist()


def bf16_grouped_seconds(
    shape: tuple[int, int], slots: Sequence[int], num_rows_of_x: int, gpu: Gpu
) -> float:
    """The reference: a grouped product in bf16 that reads every expert with slots once."""
    num_slots, hit = sum(slots), sum(map(bool, slots))
    elements = hit * shape[0] * shape[1] + num_rows_of_x * shape[1] + num_slots * shape[0]
    arithmetic = 2 * shape[0] * shape[1] * num_slots / BF16_FLOPS
    return BF16_FIXED + max(2 * elements / gpu.copy, arithmetic)


@functools.cache
def routed_listing(rate: Rate) -> Listing:
    """Machine code of the kernel for blocks of 8 slots, in bfloat16."""
    constants = narrow_launch.constants(rate, torch.bfloat16, PROCESSOR)
    return read_listing(compile_for(TARGET, routed_launch.narrow_kernel, constants))


def _nest(listing: Listing) -> tuple[Loop, Loop, Loop, Loop]:
    """The loops over blocks, batches of row tiles, slices of the inputs, and row tiles."""
    products = [
        x
        for x in listing.loops
        if listing.count(x, lambda i: i.name == "HMMA") == HALF_TILE_PRODUCTS
    ]
    blocks, batches, slices, turns = products
    assert blocks.holds(batches) and batches.holds(slices) and slices.holds(turns)
    return blocks, batches, slices, turns


def _adds(instruction: Instruction) -> bool:
    return instruction.name == "FADD"


def _requests(listing: Listing) -> list[Request]:
    """The request of every instruction.

    Prefetches come in pairs, of a whole tile and of half of one: the first stands for both, with
    half a tile for every warp.
    """
    requests, prefetches, chunk = [NOTHING] * len(listing.code), 0, 0
    for i, x in enumerate(listing.code):
        if x.name == "UBLKPF":
            # A turn ahead: in the loop, and for a block's first turn before and behind it.
            requests[i] = Request(Source.WORDS, ahead=NEVER if prefetches % 2 else 1)
            prefetches += 1
        elif x.name == "LDG" and goes_past_l1(x):
            requests[i] = Request(Source.WORDS, 512, ahead=1, bypass=True)
        elif x.name == "LDG" and ".128" in x.opcode:
            requests[i] = Request(Source.TOKENS, chunk=chunk % CHUNKS)
            chunk += 1
        elif x.name == "LDG":  # routing, entries; row norms, which were prefetched
            requests[i] = Request(Source.L2, 32)
    assert chunk == 2 * CHUNKS, "activations of a block, and in the last turn of a slice"
    return requests


def turns_of_programs(
    shape: tuple[int, int], slots: Sequence[int], programs: int
) -> list[tuple[int, ...]]:
    """For every program, how many turns it has of each of its blocks."""
    blocks = sum(-(-count // routed_launch.NARROW_SLOTS) for count in slots)
    row_tiles = -(-shape[0] // 16)
    each = -(-row_tiles // routed_launch.row_tiles_at_once(shape[1]))
    even, own = -(-blocks * each // programs), -(-each // max(programs // blocks, 1))
    if blocks <= programs and own <= even + 1:
        return [(min(own, each - i),) for _ in range(blocks) for i in range(0, each, own)]
    edges = [min(program * even, blocks * each) for program in range(programs + 1)]
    return [
        tuple(
            min(end, (block + 1) * each) - max(begin, block * each)
            for block in range(begin // each, -(-end // each))
        )
        for begin, end in itertools.pairwise(edges)
        if begin < end
    ]


@dataclasses.dataclass(frozen=True)
class _Path:
    """What the warps of a program execute; ``turns`` has the number of turns for each block."""

    listing: Listing
    nest: tuple[Loop, Loop, Loop, Loop]
    num_inputs: int
    batch: int  # turns
    turns: tuple[int, ...]

    @property
    def halves(self) -> int:
        """Warps of a row tile."""
        return -(-self.num_inputs // 256)

    def size(self, where: Turns) -> int:
        """Turns of a batch."""
        blocks, batches, _, _ = self.nest
        at = dict(where)
        return min(self.batch, self.turns[at[blocks]] - self.batch * at.get(batches, 0))

    def trips(self, loop: Loop, where: Turns) -> int:
        """How often a warp goes round a loop."""
        blocks, batches, sliced, decoding = self.nest
        if loop == blocks:
            return len(self.turns)
        if loop == batches:
            return -(-self.turns[dict(where)[blocks]] // self.batch)
        if loop == decoding:
            return self.size(where)
        if batches.holds(loop) and loop.first > sliced.last:
            return self._trips_of_sums(loop, where)
        return 1

    def _trips_of_sums(self, loop: Loop, where: Turns) -> int:
        """:meth:`trips` of a loop that adds up the sums of a batch; a thread adds one in a turn."""
        _, batches, sliced, _ = self.nest
        if loop in self.listing.inside(batches):
            sums = self.size(where) * routed_launch.row_tiles_at_once(self.num_inputs) * 128
            return -(-sums // (32 * narrow_launch.WARPS))
        if self.listing.inside(loop):
            return 1  # slice
        # One loop adds up the sums of several warps in a turn, another those that are left.
        adds = [
            self.listing.count(x, _adds)
            for x in self.listing.loops
            if x.first > sliced.last and batches.holds(x) and not self.listing.inside(x)
        ]
        rest = self.listing.count(loop, _adds) < max(adds)
        return self.halves % max(adds) if rest else self.halves // max(adds)

    def steps(
        self, blocks: Blocks, requests: Sequence[Request], warp: int
    ) -> tuple[BlockStep, ...]:
        """The steps of one warp."""
        outer, batches, _, decoding = self.nest
        used = self.halves * routed_launch.row_tiles_at_once(self.num_inputs)
        own = TILE_BYTES // 2 * (warp % self.halves) if warp < used else -1
        # Turns of a block are numbered so that no prefetch of the block before reaches them.
        firsts = [sum(self.turns[:i]) + 2 * i for i in range(len(self.turns) + 1)]
        found, done = [], -1
        for step in walk(self.listing, self.trips):
            where = dict(step.turns)
            if decoding in where:
                at = firsts[where[outer]] + self.batch * where[batches] + where[decoding]
                span = range(step.first, step.last + 1)
                loads = any(requests[i].source == Source.TOKENS for i in span)
                found.append(BlockStep(blocks.number(step), -1 if loads else own, at))
                done = where[outer]
            elif step.first <= batches.last or done + 1 < len(self.turns):  # the last is the end
                found.append(BlockStep(blocks.number(step), own, firsts[done + 1] - 1))
        return tuple(found)


def routed_narrow_launch(
    shape: tuple[int, int],
    slots: Sequence[int],
    num_rows_of_x: int,
    rate: Rate,
    machine: Machine,
) -> Launch:
    """The kernel for blocks of 8 slots, with the grid that its launcher chooses."""
    listing = routed_listing(rate)
    requests, nest = _requests(listing), _nest(listing)
    blocks = Blocks(listing, requests, machine)
    batch = narrow_launch.slots(rate, PROCESSOR.shared_memory)
    assert shape[1] <= 256 * narrow_launch.WARPS, "several slices are not modeled"

    @functools.cache
    def warps(turns: tuple[int, ...]) -> list[tuple[BlockStep, ...]]:
        path = _Path(listing, nest, shape[1], batch, turns)
        return [path.steps(blocks, requests, warp) for warp in range(narrow_launch.WARPS)]

    programs = turns_of_programs(shape, slots, PROCESSOR.multiprocessors)
    return Launch(
        blocks.records,
        [(0, warps(own)) for own in programs],
        programs_each=1,
        tokens=min(num_rows_of_x, routed_launch.NARROW_SLOTS),
        row_bytes=2 * shape[1],
        tile_bytes=rate.index_bits * 256,
    )


def simulate_part(launch: Launch, gpu: Gpu, machine: Machine) -> Outcome:
    """A launch, or what stands for it; see :data:`PARTS`."""
    if max(step.turn for step in launch.programs[0][1][0]) < WHOLE_TURNS:
        return simulate(launch, gpu, machine)
    part = dataclasses.replace(
        launch,
        programs=launch.programs[PARTS // 2 :: PARTS],
        multiprocessors=launch.multiprocessors // PARTS,
    )
    machine = dataclasses.replace(machine, l2_bandwidth=machine.l2_bandwidth / PARTS)
    return simulate(part, dataclasses.replace(gpu, copy=gpu.copy / PARTS), machine)
