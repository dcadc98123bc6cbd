"""The text of a kernel, taken apart."""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        predicate: "%p1", "!%p1" or None.
        opcode: with its modifiers.
        operands: a list in braces and an address in brackets are one each.
        target: of a branch, the number of the instruction that it goes to.
    """

    predicate: str | None
    opcode: list[str]
    operands: list[str]
    target: int = -1


class Code:
    """One kernel.

    Attributes:
        parameters: their names.
        threads: of a program.
        instructions: in order.
    """

    def __init__(self, ptx: str) -> None:
        head, body = ptx[ptx.index(".entry") :].split("{", 1)
        self.parameters = re.findall(r"(\w+_param_\d+)", head)
        required = re.search(r"\.reqntid (\d+)", ptx)
        assert required
        self.threads = int(required[1])
        self.instructions: list[Instruction] = []
        self._labels: dict[tuple[int, str], int] = {}
        self._blocks: list[int] = []  # of every instruction, the block in braces it is in
        self._parse(body)
        self.instructions = [
            instruction._replace(target=self._target(instruction.operands[0], block))
            if instruction.opcode[0] == "bra"
            else instruction
            for instruction, block in zip(self.instructions, self._blocks, strict=True)
        ]

    def _parse(self, body: str) -> None:
        open_blocks, blocks = [0], 1
        for line in body.splitlines():
            for text in line.split("//")[0].split(";"):
                statement = text.strip()
                while statement[:1] in ("{", "}"):
                    if statement[0] == "{":
                        open_blocks.append(blocks)
                        blocks += 1
                    else:
                        open_blocks.pop()
                    statement = statement[1:].strip()
                if not open_blocks:
                    return
                self._parse_statement(statement, open_blocks[-1])

    def _parse_statement(self, statement: str, block: int) -> None:
        if match := re.fullmatch(r"([$\w]+):", statement):
            self._labels[block, match[1]] = len(self.instructions)
        elif match := re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[3])
            self.instructions.append(Instruction(match[1], match[2].split("."), operands))
            self._blocks.append(block)

    def _target(self, label: str, block: int) -> int:
        """A label of the same block, or of the kernel."""
        return self._labels.get((block, label), self._labels.get((0, label), -1))


def names(operand: str) -> list[str]:
    """The parts of a list in braces or an address in brackets."""
    return [name.strip() for name in operand.strip("{}[]").split(",")]
