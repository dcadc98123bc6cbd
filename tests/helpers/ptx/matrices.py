"""The matrix instructions, for all warps of some registers at once.

A lane is (g, t) = (lane / 4, lane % 4). Of a first operand with 16 rows and 16 k, it holds rows g
and g + 8, each with k = 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. Of the sums, it holds the same rows, and
columns 2 t and 2 t + 1 of every 8.
"""

import re

import numpy as np

from tests.helpers.ptx.code import names
from tests.helpers.ptx.registers import U32, Array, Registers, bf16_to_float
from tests.helpers.ptx.shared import FIRST


def to_float(bits: Array, kind: str) -> Array:
    """uint16 as float32; ``kind`` is bf16 or f16."""
    if kind == "bf16":
        return bf16_to_float(bits)
    return bits.view(np.float16).astype(np.float32)


def _halves(registers: Registers, operand: str, kind: str) -> Array:
    """[warp, g, t, register, half] of a list of registers."""
    words = np.stack([registers.read(name) for name in names(operand)], 1)
    words = words.reshape(-1, 8, 4, words.shape[1])
    bits = np.stack([words & U32(0xFFFF), words >> U32(16)], -1).astype(np.uint16)
    return to_float(bits, kind)


def _first_operand(registers: Registers, operand: str, kind: str) -> Array:
    """[warp, 16, 16]; the registers are those of k + 8 and row + 8."""
    left = _halves(registers, operand, kind).reshape(-1, 8, 4, 2, 2, 2)
    return left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)


def _of_lanes(sums: Array) -> Array:
    """Sums [warp, 16, n] as [thread, register]."""
    warps, _, columns = sums.shape
    lanes = sums.reshape(warps, 2, 8, columns // 8, 4, 2)  # row + 8, g, column / 8, t, half
    return lanes.transpose(0, 2, 4, 3, 1, 5).reshape(warps * 32, columns // 2)


def multiply_in_warps(registers: Registers, opcode: list[str], operands: list[str]) -> None:
    """mma.m16n8k16."""
    assert opcode[3:6] == ["m16n8k16", "row", "col"], opcode
    d, a, b, c = operands
    left = _first_operand(registers, a, opcode[7])
    right = _halves(registers, b, opcode[7]).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
    products = _of_lanes(left @ right)
    for i, (to, of) in enumerate(zip(names(d), names(c), strict=True)):
        sums = (registers.read_float(of) + products[:, i]).astype(np.float32)
        registers.write(to, sums.view(U32))


def second_operand_bytes(descriptor: int, columns: int) -> Array:
    """Where wgmma finds its second operand: offsets [column, k] in shared memory, of 16 k.

    Columns lie 128 bytes apart, groups of 8 columns as far apart as the descriptor says. Within
    128 bytes, the number of a 16 byte piece is XORed with the 3 address bits above.
    """
    assert descriptor >> 62 == 1, "only the 128 byte swizzle is known"
    assert descriptor >> 49 & 7 == 0, "a base offset"
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    column = np.arange(columns)
    address = start + column // 8 * stride + column % 8 * 128
    address = address[:, None] + 2 * np.arange(16)
    return (address ^ (address >> 7 & 7) << 4) - FIRST


def multiply_in_warpgroups(
    registers: Registers, opcode: list[str], operands: list[str], right: Array
) -> None:
    """wgmma.m64nNk16 with its first operand in registers: every warp has 16 of the 64 rows.

    Args:
        right: the second operand [N, 16] uint16.
    """
    d, a, _, accumulate, *scales = operands
    kind = opcode[-1]
    assert scales[:2] == ["1", "1"] and scales[2] == "0", operands
    adds = accumulate != "0" and bool(registers.values[accumulate].any())
    assert not adds or registers.values[accumulate].all()
    products = _of_lanes(_first_operand(registers, a, kind) @ to_float(right, kind).T)
    for i, name in enumerate(names(d)):
        before = registers.read_float(name) if adds else 0
        sums = (before + products[:, i]).astype(np.float32)
        registers.write(name, sums.view(U32))


def columns_of(opcode: list[str]) -> int:
    """N of a wgmma."""
    shape = re.fullmatch(r"m64n(\d+)k16", opcode[4])
    assert shape and opcode[1:4] == ["mma_async", "sync", "aligned"], opcode
    return int(shape[1])
