"""Launches of the rotation."""

import functools
from collections.abc import Sequence

import torch

from benchmarks.kernels.model.assumptions import Machine
from benchmarks.kernels.model.blocks import PROCESSOR, TARGET, Blocks
from benchmarks.kernels.model.listing import Instruction, Listing, read_listing
from benchmarks.kernels.model.paths import walk
from benchmarks.kernels.model.simulate import BlockStep, Launch
from benchmarks.kernels.model.trace import NOTHING, Record, Request, Source, width
from benchmarks.kernels.sass import compile_for
from qamw_kernels.ops.triton import rotate_kernels as kernels
from qamw_kernels.ops.triton import rotate_launch as launch

PROGRAMS_EACH = 8  # on a multiprocessor: of 256 threads and few registers


@functools.cache
def rotate_listing(rotation_block_size: int, swapped: bool) -> Listing:
    """Machine code of the rotation in bfloat16."""
    constants = launch.rotate_constants(rotation_block_size, torch.bfloat16, swapped, True)
    return read_listing(compile_for(TARGET, kernels.rotate_kernel, constants))


@functools.cache
def rotate_many_listing(rotation_block_size: int, by_expert: bool) -> Listing:
    """The same for the kernel for many tokens, or for those of sorted slots."""
    constants = launch.rotate_many_constants(rotation_block_size, torch.bfloat16, by_expert, True)
    return read_listing(compile_for(TARGET, kernels.rotate_many_kernel, constants))


def rotate_launch(
    num_inputs: int,
    num_tokens: int,
    rotation_block_size: int,
    machine: Machine,
    swapped: bool = False,
) -> Launch:
    """The rotation: L2 has the activations, but not the layer's scales.

    Only the programs of the first token wait for HBM: the others find the scales in L2.

    Args:
        swapped: for the wide kernel.
    """
    rows = num_inputs // rotation_block_size
    if swapped and num_tokens * num_inputs > launch.MANY_INPUTS:
        return rotate_many_launch(num_inputs, num_tokens, rotation_block_size, machine)
    constants = launch.rotate_constants(rotation_block_size, torch.bfloat16, swapped, True)
    listing = rotate_listing(rotation_block_size, swapped)
    loads = [i for i, x in enumerate(listing.code) if x.name == "LDG"]
    of_scales = loads[len(loads) // 2 :]
    pieces = rotation_block_size // constants["WIDTH"]
    of_a_token = -(-rows // constants["BLOCK_R"]) * pieces
    grid = -(-num_tokens * rows // constants["BLOCK_R"]) * pieces
    turns = [(program < of_a_token, 1) for program in range(grid)]
    return _launch(listing, of_scales, turns, constants["num_warps"], PROGRAMS_EACH, machine)


def rotate_many_launch(
    num_inputs: int,
    num_tokens: int,
    rotation_block_size: int,
    machine: Machine,
    by_expert: bool = False,
) -> Launch:
    """The same by the kernel for many tokens, or for those of sorted slots, padding included."""
    constants = launch.rotate_many_constants(rotation_block_size, torch.bfloat16, by_expert, True)
    listing = rotate_many_listing(rotation_block_size, by_expert)
    (loop,) = listing.loops
    of_scales = [
        i
        for i, x in enumerate(listing.code[: loop.first])
        if x.name == "LDG" and ".128" in x.opcode
    ]
    blocks = -(-num_tokens // constants["BLOCK_M"])
    programs, spans = launch.many_grid(num_tokens, num_inputs, constants, PROCESSOR.multiprocessors)
    turns = [
        (program == 0, len(range(program, blocks, programs)))
        for _ in range(spans)
        for program in range(programs)
    ]
    each = launch.MANY_PROGRAMS
    return _launch(listing, of_scales, turns, constants["num_warps"], each, machine)


def _launch(
    listing: Listing,
    of_scales: Sequence[int],
    turns: Sequence[tuple[bool, int]],
    warps: int,
    programs_each: int,
    machine: Machine,
) -> Launch:
    """A launch whose programs have one loop, or none.

    Args:
        of_scales: the instructions that load scales.
        turns: for every program, whether it waits for HBM, and how often it goes round the loop.
    """
    records: list[list[Record]] = []
    paths: dict[tuple[bool, int], list[tuple[BlockStep, ...]]] = {}
    for waits in (True, False):
        requests = [_request(x) for x in listing.code]
        for i in of_scales:
            requests[i] = Request(Source.HBM if waits else Source.L2, 256)
        blocks, first = Blocks(listing, requests, machine), len(records)
        for key in set(turns):
            if key[0] == waits:
                walked = walk(listing, lambda *_, key=key: key[1])
                steps = tuple(BlockStep(first + blocks.number(s), 0, -1) for s in walked)
                paths[key] = [steps] * warps
        records += blocks.records
    return Launch(records, [(0, paths[key]) for key in turns], programs_each)


def _request(instruction: Instruction) -> Request:
    """The request of an instruction: of a load or a store, all that a warp moves."""
    if instruction.name not in ("LDG", "STG"):
        return NOTHING
    return Request(Source.L2, 32 * width(instruction))
