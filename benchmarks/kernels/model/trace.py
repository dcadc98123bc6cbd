"""What an instruction costs, and what it requests from memory."""

import re
from enum import IntEnum
from typing import NamedTuple

from benchmarks.kernels.model.assumptions import Machine
from benchmarks.kernels.model.listing import Instruction

Unit = IntEnum(
    "Unit",
    "ALU FMA HMMA SHARED GLOBAL STORE BARRIER OTHER WGMMA WGMMA_WAIT COPY COPY_COMMIT COPY_WAIT "
    "BULK_COPY BULK_WAIT PREFETCH GRID_WAIT",
    start=0,
)
"""What executes an instruction; the order is that of simulator.cpp."""

Source = IntEnum("Source", "NOWHERE WORDS TOKENS L2 HBM", start=0)
"""Where data come from: index words of the warp's tile, activations of its tokens, anything that
L2 holds, anything that it does not."""


class Request(NamedTuple):
    """What an instruction requests from global memory.

    Attributes:
        bytes: of a warp, or of a copy that one thread starts.
        chunk: which 32 inputs of the activations.
        ahead: turns of the main loop from here to the use of the words.
        bypass: takes no room in L1.
    """

    source: Source
    bytes: int = 0
    chunk: int = 0
    ahead: int = 0
    bypass: bool = False


NOTHING = Request(Source.NOWHERE)
NEVER = 1 << 20
"""Turns ahead of a request that is past the last turn, and so brings nothing."""
INTEGER = re.compile(
    "LOP3|SHF|ISETP|SEL|VIMNMX|VIADDMNMX|PRMT|IADD3|LEA|SGXT|PLOP3|VIADD|FSETP|FMNMX|F2FP|POPC|I2FP?"
    "|MOV"
)
"""What the integer unit executes: half a warp a cycle."""
UNITS = {
    **dict.fromkeys(("LDS", "LDSM", "STS", "STSM", "SHFL"), Unit.SHARED),
    **dict.fromkeys(("STG", "RED"), Unit.STORE),
    "IMAD": Unit.FMA,
    "HMMA": Unit.HMMA,
    "LDG": Unit.GLOBAL,
    "BAR": Unit.BARRIER,
    "HGMMA": Unit.WGMMA,
    "LDGSTS": Unit.COPY,
    "LDGDEPBAR": Unit.COPY_COMMIT,
    "UTMALDG": Unit.BULK_COPY,
    "UBLKPF": Unit.PREFETCH,
    "ACQBULK": Unit.GRID_WAIT,
}


class Record(NamedTuple):
    """An instruction for simulator.cpp, in the order of its fields."""

    unit: int
    stall: int
    write_barrier: int
    read_barrier: int
    waits: int
    source: int
    bytes: int
    pipe: int
    latency: int
    chunk: int
    ahead: int
    bypass: int


def width(instruction: Instruction) -> int:
    """Bytes that a thread loads or stores."""
    if instruction.name in ("LDSM", "STSM"):
        return 16
    found = re.search(r"\.(128|64|U16|U8)\b", instruction.opcode)
    return {"128": 16, "64": 8, "U16": 2, "U8": 1}[found[1]] if found else 4


def unit_of(instruction: Instruction) -> Unit:
    """The unit that executes an instruction, or what the simulator has to do for it."""
    if instruction.name == "DEPBAR" and "gsb" in instruction.operands:
        return Unit.WGMMA_WAIT
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        return Unit.WGMMA_WAIT
    if instruction.opcode.startswith("DEPBAR.LE"):
        return Unit.COPY_WAIT
    if instruction.opcode.startswith("SYNCS.PHASECHK"):
        return Unit.BULK_WAIT
    if INTEGER.fullmatch(instruction.name):
        return Unit.ALU
    return UNITS.get(instruction.name, Unit.OTHER)


def _cost(instruction: Instruction, unit: Unit, machine: Machine) -> tuple[int, int]:
    """Cycles of the unit, and from there to the result."""
    lsu = -(-32 * width(instruction) // machine.lsu_bytes)
    if instruction.name == "SHFL":
        return 1, machine.shuffle_latency
    if unit == Unit.WGMMA:
        return round(wgmma_columns(instruction) * machine.wgmma_per_column), machine.wgmma_latency
    return {
        Unit.ALU: (machine.alu, 4),
        Unit.FMA: (machine.fma, 4),
        Unit.HMMA: (machine.hmma, 4),
        Unit.SHARED: (lsu, machine.shared_latency),
        Unit.GLOBAL: (lsu, 0),
        Unit.COPY: (2 * lsu, 0),  # addresses out, data in
        Unit.STORE: (4, 0),
        Unit.BULK_WAIT: (0, 20),
        Unit.BARRIER: (0, 20),
        Unit.OTHER: (0, 20),
        Unit.GRID_WAIT: (0, 20),
    }.get(unit, (0, 4))


def wgmma_columns(instruction: Instruction) -> int:
    """N of an m64nNk16 product."""
    found = re.search(r"\.64x(\d+)x16", instruction.opcode)
    assert found, f"not a product of 16 bit floats: {instruction.opcode}"
    return int(found[1])


def pending(instruction: Instruction) -> int:
    """Groups that may still be under way after a wait."""
    found = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
    return int(found[1], 16) if found else 0


def record(instruction: Instruction, request: Request, machine: Machine) -> Record:
    """What the simulator has to know of an instruction."""
    unit = unit_of(instruction)
    pipe, latency = _cost(instruction, unit, machine)
    if unit == Unit.WGMMA:
        ends_group = "gsb" in instruction.operands
        columns = wgmma_columns(instruction)
        request = Request(Source.NOWHERE, bytes=32 * columns, chunk=int(ends_group))
    if unit in (Unit.WGMMA_WAIT, Unit.COPY_WAIT):
        request = Request(Source.NOWHERE, chunk=pending(instruction))
    return Record(
        unit,
        instruction.stall,
        instruction.write_barrier,
        instruction.read_barrier,
        instruction.waits,
        request.source,
        request.bytes,
        pipe,
        latency,
        request.chunk,
        request.ahead,
        int(request.bypass),
    )
