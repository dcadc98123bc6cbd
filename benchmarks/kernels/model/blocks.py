"""Stretches of a kernel as blocks of a job, and what its launches have in common."""

import re

from benchmarks.kernels.model.assumptions import Machine
from benchmarks.kernels.model.listing import Instruction, Listing
from benchmarks.kernels.model.paths import Step
from benchmarks.kernels.model.trace import Record, Request, record
from benchmarks.kernels.sass import SHARED_BYTES
from qamw_kernels.ops.launcher import Processor

TARGET = 90
"""Compute capability that kernels are compiled for."""
PROCESSOR = Processor(
    multiprocessors=132, shared_memory=SHARED_BYTES[TARGET], compute_capability=TARGET
)
TILE_BYTES = 1024  # of a token's activations


def goes_past_l1(instruction: Instruction) -> bool:
    """Whether a load bypasses L1."""
    return bool(re.search(r"STRONG|\.EF|\.NA", instruction.opcode))


class Blocks:
    """Stretches of a listing as blocks, each made once.

    Args:
        requests: of every instruction of the listing.
    """

    def __init__(self, listing: Listing, requests: list[Request], machine: Machine) -> None:
        self._listing, self._requests, self._machine = listing, requests, machine
        self._numbers: dict[tuple[int, int], int] = {}
        self.records: list[list[Record]] = []

    def number(self, step: Step) -> int:
        """The block of a step."""
        key = (step.first, step.last)
        if key not in self._numbers:
            self._numbers[key] = len(self.records)
            self.records.append(
                [
                    record(self._listing.code[i], self._requests[i], self._machine)
                    for i in range(step.first, step.last + 1)
                ]
            )
        return self._numbers[key]
