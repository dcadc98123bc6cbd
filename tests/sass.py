"""Ahead-of-time compilation of kernels, and what their machine code says. Needs no GPU."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")


def compile_for(source: Any, target: int, **options: int) -> Any:
    """What triton.compile makes of a source for CUDA's compute capability ``target``, such as 90."""
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def disassemble(compiled: Any) -> list[tuple[str, str]]:
    """Instructions in order, (opcode with its modifiers, operands); a label is ("LABEL", its name)."""
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([nvdisasm, "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            found.append(("LABEL", label[1]))
        elif instruction := INSTRUCTION.match(line):
            found.append((instruction[1], instruction[2]))
    assert any(opcode == "EXIT" for opcode, _ in found), "the disassembly could not be read"
    return found


def loops(instructions: list[tuple[str, str]]) -> list[collections.Counter[str]]:
    """Of every loop without another inside: opcode -> count."""
    at = {name: i for i, (opcode, name) in enumerate(instructions) if opcode == "LABEL"}
    bodies = []
    for end, (opcode, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands)
        if opcode.startswith("BRA") and target and at[target[0]] < end - 1:
            bodies.append((at[target[0]], end + 1))
    inner = [(a, b) for a, b in bodies if not any(a <= c and d < b for c, d in bodies)]
    return [collections.Counter(opcode for opcode, _ in instructions[a:b] if opcode != "LABEL") for a, b in inner]
