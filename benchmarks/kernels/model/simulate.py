"""A launch as a job for simulator.cpp, which ``make kernels-model`` compiles."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels.model.assumptions import MULTIPROCESSORS, Gpu, Machine
from benchmarks.kernels.model.trace import Record

SIMULATOR = Path(__file__).resolve().parents[3] / "build" / "kernels-model"


class BlockStep(NamedTuple):
    """A warp executes a block.

    Attributes:
        offset: of the activations that it loads, in bytes from the start of a token's row; -1: its
            loads are masked out.
        turn: of the main loop that the warp is in, or was in last; -1 before the first.
    """

    block: int
    offset: int
    turn: int


@dataclass
class Launch:
    """A launch of a kernel.

    Attributes:
        blocks: stretches of code.
        programs: first token and, for every warp, its steps.
        programs_each: programs that a multiprocessor holds at once.
        tokens, row_bytes: of the activations.
        tile_bytes: bytes that one prefetch brings into L2.
        copies_each: copies that the copy engine makes for a turn of the main loop.
        token_blocks: blocks of tokens; the programs of one follow those of the one before. All
            blocks have the same weights and run at the same time: HBM is asked for a weight once.
        ready: seconds after the launch until what the kernel before wrote can be read.
    """

    blocks: Sequence[Sequence[Record]]
    programs: Sequence[tuple[int, Sequence[tuple[BlockStep, ...]]]]
    programs_each: int
    tokens: int = 1
    row_bytes: int = 0
    tile_bytes: int = 0
    copies_each: float = 0.0
    token_blocks: int = 1
    ready: float = 0.0
    multiprocessors: int = field(default=MULTIPROCESSORS)


class Outcome(NamedTuple):
    """What the simulator found.

    Attributes:
        seconds: from the first program's start to the last one's end.
        hbm_bytes, l2_bytes: bytes that were moved.
        lsu: share of the time that the load/store units were busy.
        issue: instructions per cycle and scheduler.
        l1_hits: share of the requests for activations.
    """

    seconds: float
    hbm_bytes: float
    l2_bytes: float
    lsu: float
    issue: float
    l1_hits: float


def simulate(launch: Launch, gpu: Gpu, machine: Machine) -> Outcome:
    """Run the simulator.

    Raises:
        subprocess.CalledProcessError: it could not read the job.
        FileNotFoundError: it was not compiled.
    """
    job = _job(launch, gpu, machine)
    done = subprocess.run([SIMULATOR], input=job, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    cycles, sms = max(found["cycles"], 1), launch.multiprocessors
    return Outcome(
        seconds=cycles / machine.clock,
        hbm_bytes=found["hbm_bytes"],
        l2_bytes=found["l2_bytes"],
        lsu=found["lsu_busy"] / cycles / sms,
        issue=found["instructions"] / cycles / sms / 4,
        l1_hits=1 - found["l1_misses"] / max(found["l1_requests"], 1),
    )


def _job(launch: Launch, gpu: Gpu, machine: Machine) -> str:
    """Numbers in the order in which Launch::read of simulator.cpp wants them."""
    paths: dict[tuple[BlockStep, ...], int] = {}
    programs = [
        [first_token, *(paths.setdefault(steps, len(paths)) for steps in warps)]
        for first_token, warps in launch.programs
    ]
    rows: list[Sequence[float]] = [
        (
            gpu.copy / machine.clock,
            machine.l2_bandwidth / machine.clock,
            machine.link,
            machine.hbm_latency,
            machine.l2_latency,
            machine.l1_latency,
            machine.queue,
            machine.barrier_latency,
            machine.read_latency,
            machine.program_start,
            machine.l1_bytes // 128,
            launch.multiprocessors,
            launch.programs_each,
            len(launch.programs[0][1]),
            launch.tokens,
            launch.row_bytes,
            launch.tile_bytes,
            launch.copies_each,
            launch.ready * machine.clock,
            len(launch.programs) // launch.token_blocks,
            len(launch.blocks),
            len(paths),
            len(programs),
        )
    ]
    for block in launch.blocks:
        rows += [[len(block)], *block]
    for steps in paths:
        rows += [[1 + max((s.turn for s in steps), default=-1), len(steps)], *steps]
    rows += programs
    return "\n".join(" ".join(map(str, row)) for row in rows)
