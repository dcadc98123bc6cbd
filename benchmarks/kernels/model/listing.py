"""Machine code with its control bits, and the loops in it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.sass import on_cubin

LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z0-9_.x]+)\s*(.*?);\s+/\* 0x[0-9a-f]{16} \*/"
)
HIGH_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"\.L_x_\d+")


@dataclass(frozen=True)
class Instruction:
    """One instruction of sm_70 or newer.

    Attributes:
        stall: cycles before the warp's next instruction.
        write_barrier, read_barrier: scoreboards that are busy until the result is there, and until
            the sources were read; 7: none.
        waits: bit s: waits until scoreboard s is clear.
    """

    opcode: str
    operands: str
    predicate: str
    stall: int
    write_barrier: int
    read_barrier: int
    waits: int

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """Instructions first..last, of which the last branches back to the first."""

    first: int
    last: int

    def holds(self, other: "Loop") -> bool:
        """Whether the other one is inside of this one."""
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class Listing:
    """A kernel up to its last instruction that is executed in order.

    What comes behind, such as slow paths of waiting, is left out.
    """

    code: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def count(self, loop: Loop, wanted: Callable[[Instruction], bool]) -> int:
        """Instructions of a loop that are as wanted."""
        return sum(map(wanted, self.code[loop.first : loop.last + 1]))

    def inside(self, loop: Loop | None) -> list[Loop]:
        """The loops directly inside of one, or of the kernel, in order."""
        all_of_them = [x for x in self.loops if loop is None or loop.holds(x)]
        return [x for x in all_of_them if not any(y.holds(x) for y in all_of_them)]


def read_listing(compiled: Any) -> Listing:
    """The listing of a compiled kernel."""
    lines = on_cubin(compiled, "nvdisasm", "-c", "-hex").splitlines()
    at: dict[str, int] = {}
    code: list[Instruction] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if label := re.match(r"^(\.L_x_\d+):", line):
            at[label[1]] = len(code)
        elif found := LINE.match(line):
            high = HIGH_WORD.match(following)
            assert high, f"no encoding behind {line}"
            code.append(_with_control(found, int(high[1], 16)))
    code = code[: _end(code, at)]
    return Listing(tuple(code), tuple(_loops(code, at)))


def _end(code: Sequence[Instruction], at: dict[str, int]) -> int:
    """Behind the unconditional end, or before the branch to itself that stands behind all code."""
    for i, x in enumerate(code):
        if x.opcode == "EXIT" and not x.predicate:
            return i + 1
        target = LABEL.search(x.operands)
        if x.opcode == "BRA" and target and at.get(target[0]) == i:
            return i
    raise AssertionError("the disassembly could not be read")


def _with_control(found: re.Match[str], high: int) -> Instruction:
    """Control bits begin at bit 41 of the upper half of an instruction."""
    bits = high >> 41
    return Instruction(
        opcode=found[2],
        operands=found[3].strip(),
        predicate=found[1] or "",
        stall=bits & 15,
        write_barrier=bits >> 5 & 7,
        read_barrier=bits >> 8 & 7,
        waits=bits >> 11 & 63,
    )


def _loops(code: Sequence[Instruction], at: dict[str, int]) -> list[Loop]:
    found = {}
    for i, instruction in enumerate(code):
        target = LABEL.search(instruction.operands)
        if instruction.name == "BRA" and target and at.get(target[0], i) < i:
            found[at[target[0]]] = Loop(at[target[0]], i)  # of several branches back, the last
    return sorted(found.values(), key=lambda loop: (loop.first, -loop.last))
