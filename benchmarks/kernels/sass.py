"""Ahead-of-time compilation of kernels, and a look at their machine code. Needs no GPU."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a program may have, by compute capability."""

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
POINTERS = {
    "p_tiles": "*i32",
    "p_entries": "*i32",
    "p_row_norms": "*fp32",
    "p_input_scales": "*fp16",
    "p_slots": "*i32",
    "p_experts": "*i32",
    "p_num_sorted": "*i32",
    "p_sums": "*fp32",
}
"""Types of the pointers that do not point at activations."""


def descriptor_type(constants: dict[str, Any]) -> str:
    """The type of the descriptor of the activations, as Triton writes it."""
    from triton.experimental.gluon import language as gl

    shape = [constants["TOKENS"], constants["BLOCK_INPUTS"]]
    layout = gl.NVMMASharedLayout.get_default_for(shape, constants["DTYPE"])
    return f"tensordesc<{constants['DTYPE']}[{shape[0]},{shape[1]}],{layout!r}>"


def compile_for(target: int, kernel: Any, constants: dict[str, Any]) -> Any:
    """What Triton makes of a kernel for CUDA's compute capability ``target``, such as 90.

    Arguments are typed by name. As in real launches, pointers and K are multiples of 16, unless the
    kernel is not specialized on that, and nothing is known of the other sizes.

    Args:
        constants: compile-time arguments, and options of the compiler, as the launchers pass them.
    """
    gluon = type(kernel).__name__ == "GluonJITFunction"
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    activation = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}[str(constants["DTYPE"])]
    types = POINTERS | {"scale": "fp32"} | ({"p_x": "*i32"} if gluon else {})
    if "x_blocks" in kernel.arg_names:
        types["x_blocks"] = descriptor_type(constants)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        usual = activation if name.startswith("p_") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, usual)
        asked = not kernel.params[i].do_not_specialize_on_alignment
        if asked and (name.startswith("p_") or name == "K"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    fixed = {name: value for name, value in constants.items() if name in signature}
    options = {name: value for name, value in constants.items() if name not in signature}
    source = Source(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def on_cubin(compiled: Any, *command: str) -> str:
    """What a tool of Triton's own copy of the CUDA binary utilities prints about the kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / command[0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        arguments = [str(tool), *command[1:], cubin.name]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


def disassemble(compiled: Any) -> list[tuple[str, str]]:
    """Instructions in order, (opcode with its modifiers, operands).

    A label is ("LABEL", its name).
    """
    found = []
    for line in on_cubin(compiled, "nvdisasm", "-c").splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            found.append(("LABEL", label[1]))
        elif instruction := INSTRUCTION.match(line):
            found.append((instruction[1], instruction[2]))
    assert any(opcode == "EXIT" for opcode, _ in found), "the disassembly could not be read"
    return found


def registers(compiled: Any) -> int:
    """Registers of a thread."""
    usage = re.search(r"REG:(\d+)", on_cubin(compiled, "cuobjdump", "--dump-resource-usage"))
    assert usage, "the resource usage could not be read"
    return int(usage[1])


def loops(instructions: list[tuple[str, str]]) -> list[collections.Counter[str]]:
    """For every innermost loop: opcode -> count.

    Loops over the lanes of a warp, for an operand that is the same for all lanes, are ignored.
    """
    labels = enumerate(instructions)
    at = {name: i for i, (opcode, name) in labels if opcode == "LABEL"}
    bodies = []
    for end, (opcode, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands)
        if opcode.startswith("BRA") and "ANY" not in opcode and target and at[target[0]] < end - 1:
            bodies.append((at[target[0]], end + 1))
    inner = [(a, b) for a, b in bodies if not any(a <= c and d < b for c, d in bodies)]
    return [
        collections.Counter(opcode for opcode, _ in instructions[a:b] if opcode != "LABEL")
        for a, b in inner
    ]
