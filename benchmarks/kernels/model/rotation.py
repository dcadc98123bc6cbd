"""Launches of the rotation."""

import functools

import torch

from benchmarks.kernels.model.assumptions import Machine
from benchmarks.kernels.model.blocks import TARGET, Blocks
from benchmarks.kernels.model.listing import Listing, read_listing
from benchmarks.kernels.model.paths import walk
from benchmarks.kernels.model.simulate import BlockStep, Launch
from benchmarks.kernels.model.trace import NOTHING, Request, Source
from benchmarks.kernels.sass import compile_for
from qamw_kernels.ops.triton import kernels, launch

PROGRAMS_EACH = 8  # on a multiprocessor: of 256 threads and few registers


@functools.cache
def rotate_listing(rotation_block_size: int, early: bool) -> Listing:
    """Machine code of the rotation in bfloat16."""
    constants = launch.rotate_constants(rotation_block_size, torch.bfloat16, early=early)
    return read_listing(compile_for(TARGET, kernels.rotate_kernel, constants))


def rotate_launch(
    num_inputs: int, num_tokens: int, rotation_block_size: int, early: bool, machine: Machine
) -> Launch:
    """The rotation: L2 has the activations, but not the layer's scales, which are loaded last."""
    constants = launch.rotate_constants(rotation_block_size, torch.bfloat16, early=early)
    listing = rotate_listing(rotation_block_size, early)
    requests = [NOTHING] * len(listing.code)
    loads = [i for i, x in enumerate(listing.code) if x.name == "LDG"]
    for n, i in enumerate(loads):
        requests[i] = Request(Source.HBM if 2 * n >= len(loads) else Source.L2, 256)
    blocks = Blocks(listing, requests, machine)
    steps = tuple(BlockStep(blocks.number(s), 0, -1) for s in walk(listing, lambda *_: 1))
    rows = -(-num_tokens * num_inputs // rotation_block_size)
    grid = -(-rows // constants["BLOCK_R"]) * (rotation_block_size // constants["WIDTH"])
    programs = [(0, [steps] * constants["num_warps"])] * grid
    return Launch(blocks.records, programs, PROGRAMS_EACH)
