"""Registers of some threads that run in step, and what is computed with them."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.helpers.ptx.code import names

Array = np.ndarray[Any, Any]
UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
U32 = np.uint32

# Of two operands of one unsigned type.
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "shl": np.left_shift,
    "shr": np.right_shift,
}
COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "gt": np.greater,
    "lt": np.less,
    "ge": np.greater_equal,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


def bf16_to_float(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(np.float32)


def float_to_bf16(values: Array) -> Array:
    bits = values.view(U32)
    return ((bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)).astype(np.uint16)


def bits_of(kind: str) -> int:
    """Width in bits: 32 for "f32", "s32", "b32", and also for a kind without a width."""
    return int(re.sub(r"\D", "", kind) or 32)


class Registers:
    """The registers of ``count`` threads, whole warps. ``mask`` says which execute instructions."""

    def __init__(self, count: int, values: dict[str, Array]) -> None:
        self.count, self.values = count, values
        self.mask: Array = np.ones(count, bool)

    def all(self, value: int, bits: int = 32) -> Array:
        return np.full(self.count, value & ((1 << bits) - 1), UNSIGNED[bits])

    def read(self, operand: str, bits: int = 32) -> Array:
        if operand in self.values:
            value = self.values[operand]
            return value if value.dtype == bool else value.astype(UNSIGNED[bits])
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return self.all(number, bits)

    def read_float(self, operand: str) -> Array:
        return self.read(operand).view(np.float32)

    def write(self, register: str, value: Array) -> None:
        if register != "_":
            old = self.values.get(register, np.zeros_like(value))
            self.values[register] = np.where(self.mask, value, old)

    def execute(self, opcode: list[str], operands: list[str]) -> None:
        """An instruction that only reads and writes registers."""
        name, kind = opcode[0], opcode[-1]
        bits = bits_of(kind)
        target, sources = operands[0], operands[1:]
        if opcode == ["mov", "pred"]:
            self.write(target, self.all(int(sources[0])) != 0)
        elif name == "mov":
            self._move(target, sources[0], bits)
        elif opcode == ["not", "pred"]:
            self.write(target, ~self.values[sources[0]])
        elif kind == "pred":
            a, b = (self.values[source] for source in sources)
            self.write(target, BINARY[name](a, b))
        elif name == "selp":
            a, b = (self.read(source, bits) for source in sources[:2])
            self.write(target, np.where(self.values[sources[2]], a, b))
        elif name == "setp":
            dtype = SIGNED[bits] if kind[0] == "s" else UNSIGNED[bits]
            a, b = (self.read(source, bits).view(dtype) for source in sources)
            self.write(target, COMPARE[opcode[1]](a, b))
        elif name == "elect":  # one lane of every warp; not the first, so that none may rely on it
            self.write(target.split("|")[1], np.arange(self.count) % 32 == 31)
        elif kind == "f32" and name in ("add", "mul", "fma"):
            a, b, *rest = (self.read_float(source) for source in sources)
            value = a * b + rest[0] if name == "fma" else BINARY[name](a, b)
            self.write(target, value.astype(np.float32).view(U32))
        elif name == "shfl":
            self._shuffle(opcode[2], target, *sources)
        elif name == "cvta":
            self.write(target, self.read(sources[0], bits))
        elif name == "cvt":
            to = opcode[-2].removesuffix("x2")
            low, *above = (self._convert(to, kind, source) for source in reversed(sources))
            self.write(target, low.astype(U32) | above[0].astype(U32) << 16 if above else low)
        else:
            self.write(target, self._integer(opcode, kind, bits, sources))

    def _integer(self, opcode: list[str], kind: str, bits: int, sources: list[str]) -> Array:
        name, signed = opcode[0], kind[0] == "s"
        if name in ("mad", "mul") and opcode[1] == "wide":
            a, b = (
                self.read(s).view(np.int32 if signed else U32).astype(np.int64).view(np.uint64)
                for s in sources[:2]
            )
            return a * b + (self.read(sources[2], 64) if name == "mad" else np.uint64(0))
        a = self.read(sources[0], bits)
        if name == "neg":
            return ~a + a.dtype.type(1)
        if name == "not":
            return ~a
        b = self.read(sources[1], bits)
        if name == "mad":
            return a * b + self.read(sources[2], bits)
        if name == "lop3":
            return self._any_function(a, b, self.read(sources[2]), int(sources[3], 0))
        if name == "prmt":
            return self._permute(a, b, self.read(sources[2]))
        if name == "bfe":
            length = self.read(sources[2])
            field = (a >> b) & ((U32(1) << length) - U32(1))
            sign = U32(1) << (length - U32(1)) if signed else U32(0)
            return (field ^ sign) - sign
        if name == "shf":
            # Of the 64 bits b:a, the upper word after a shift to the left, the lower one after a
            # shift to the right.
            both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
            shift = (self.read(sources[2]) & U32(31)).astype(np.uint64)
            shifted = (both << shift) >> np.uint64(32) if opcode[1] == "l" else both >> shift
            return shifted.astype(U32)
        if name in ("div", "rem"):
            return self._divide(name, a, b, SIGNED[bits] if signed else UNSIGNED[bits])
        if signed and name in ("min", "max", "shr"):
            return BINARY[name](a.view(SIGNED[bits]), b.view(SIGNED[bits])).view(UNSIGNED[bits])
        return BINARY[name](a, b)

    def _shuffle(
        self, mode: str, target: str, source: str, which: str, bounds: str, _: str
    ) -> None:
        """Every thread gets another lane's value, or keeps its own if that lane is outside."""
        assert self.mask.all(), "a shuffle without some of the threads"
        threads, number = np.arange(self.count), int(which, 0)
        lanes = threads % 32
        inside = np.ones(self.count, bool)
        if mode == "bfly":
            lanes = lanes ^ number
        elif mode == "up":  # within segments of lanes
            inside = lanes - number >= (lanes & int(bounds, 0) >> 8)
            lanes = np.where(inside, lanes - number, lanes)
        else:
            assert mode == "idx", mode
            lanes = np.full(self.count, number)
        value, _, predicate = target.partition("|")
        self.write(value, self.read(source)[threads // 32 * 32 + lanes])
        if predicate:
            self.write(predicate, inside)

    @staticmethod
    def _any_function(a: Array, b: Array, c: Array, table: int) -> Array:
        """The function of three bits whose value for a = 0xF0, b = 0xCC, c = 0xAA is ``table``."""
        result = np.zeros_like(a)
        for case in range(8):
            if table >> case & 1:
                of_a, of_b, of_c = (
                    word if case & bit else ~word for word, bit in ((a, 4), (b, 2), (c, 1))
                )
                result |= of_a & of_b & of_c
        return result

    def _permute(self, a: Array, b: Array, selector: Array) -> Array:
        """Of the 8 bytes b:a, the four that the selector names."""
        both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        places = selector[:, None] >> U32([0, 4, 8, 12]) & U32(15)
        assert (places < 8).all(), "a copied sign"
        chosen = both.view(np.uint8).reshape(-1, 8)[np.arange(self.count)[:, None], places]
        return chosen.copy().view(U32)[:, 0]

    @staticmethod
    def _divide(name: str, a: Array, b: Array, dtype: type) -> Array:
        """Quotient rounded toward zero, or remainder; negative numbers are not needed."""
        x, y = a.view(dtype), b.view(dtype)
        assert (x >= 0).all() and (y > 0).all(), "division of a negative number, or by zero"
        return (x // y if name == "div" else x % y).view(a.dtype)

    def _convert(self, to: str, kind: str, source: str) -> Array:
        if kind == "bf16":
            return bf16_to_float(self.read(source, 16)).view(U32)
        if kind == "f16":
            return self.read(source, 16).view(np.float16).astype(np.float32).view(U32)
        if kind == "f32":
            value = self.read_float(source)
            if to == "bf16":
                return float_to_bf16(value)
            return value.astype(np.float16).view(np.uint16)
        bits, wide = int(kind[1:]), int(to[1:])
        value = self.read(source, bits)
        if kind[0] == "s":
            value = value.view(SIGNED[bits]).astype(SIGNED[wide])
        return value.astype(UNSIGNED[wide])

    def _move(self, target: str, source: str, bits: int) -> None:
        half = bits // 2
        if source.startswith("{"):
            low, high = (self.read(part, half).astype(UNSIGNED[bits]) for part in names(source))
            self.write(target, low | high << UNSIGNED[bits](half))
        elif target.startswith("{"):
            value = self.read(source, bits)
            for i, part in enumerate(names(target)):
                shifted = value >> UNSIGNED[bits](half * i)
                self.write(part, shifted.astype(UNSIGNED[half]))
        else:
            self.write(target, self.read(source, bits))
