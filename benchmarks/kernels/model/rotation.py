"""Launches of the rotation."""

import functools

import torch

from benchmarks.kernels.model.assumptions import Machine
from benchmarks.kernels.model.blocks import TARGET, Blocks
from benchmarks.kernels.model.listing import Listing, read_listing
from benchmarks.kernels.model.paths import walk
from benchmarks.kernels.model.simulate import BlockStep, Launch
from benchmarks.kernels.model.trace import NOTHING, Record, Request, Source
from benchmarks.kernels.sass import compile_for
from qamw_kernels.ops.triton import kernels, launch

PROGRAMS_EACH = 8  # on a multiprocessor: of 256 threads and few registers


@functools.cache
def rotate_listing(rotation_block_size: int, swapped: bool, many: bool) -> Listing:
    """Machine code of the rotation in bfloat16."""
    constants = launch.rotate_constants(rotation_block_size, torch.bfloat16, swapped, True, many)
    return read_listing(compile_for(TARGET, kernels.rotate_kernel, constants))


def rotate_launch(
    num_inputs: int,
    num_tokens: int,
    rotation_block_size: int,
    machine: Machine,
    swapped: bool = False,
) -> Launch:
    """The rotation: L2 has the activations, but not the layer's scales, which are loaded last.

    Only the programs of the first token wait for HBM: the others find the scales in L2.

    Args:
        swapped: for the wide kernel.
    """
    rows = num_inputs // rotation_block_size
    many = swapped and num_tokens * rows > launch.ROTATE_MANY
    constants = launch.rotate_constants(rotation_block_size, torch.bfloat16, swapped, True, many)
    listing = rotate_listing(rotation_block_size, swapped, many)
    loads = [i for i, x in enumerate(listing.code) if x.name == "LDG"]
    records: list[list[Record]] = []
    paths: list[list[tuple[BlockStep, ...]]] = []
    for scales in (Source.HBM, Source.L2):
        requests = [NOTHING] * len(listing.code)
        for n, i in enumerate(loads):
            requests[i] = Request(scales if 2 * n >= len(loads) else Source.L2, 256)
        blocks, first = Blocks(listing, requests, machine), len(records)
        walked = walk(listing, lambda *_: 1)
        steps = tuple(BlockStep(first + blocks.number(s), 0, -1) for s in walked)
        records += blocks.records
        paths.append([steps] * constants["num_warps"])
    pieces = rotation_block_size // constants["WIDTH"]
    of_a_token = -(-rows // constants["BLOCK_R"]) * pieces
    grid = -(-num_tokens * rows // constants["BLOCK_R"]) * pieces
    programs = [(0, paths[program >= of_a_token]) for program in range(grid)]
    return Launch(records, programs, PROGRAMS_EACH)
