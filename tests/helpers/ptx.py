"""Executes PTX on the CPU: a kernel that has no interpreter can be checked without a GPU.

All threads of a program run in step, so races are not seen, and branches must be uniform. The
instructions are those that the tests of the kernels meet; any other is an error. Accesses out of
bounds and misaligned ones are errors too. Written after the PTX ISA reference.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
SHARED = 1 << 20  # where shared memory begins
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


Instruction = tuple[str | None, list[str], list[str]]
"""Predicate, opcode and its modifiers, operands."""


class Machine:
    """One kernel.

    Attributes:
        look_ups: 32 bit loads from the table, which begins where shared memory is first written.
        look_up_conflicts: most lanes of a warp that one of them found in the same bank.
    """

    def __init__(self, ptx: str) -> None:
        entry = ptx[ptx.index(".entry") :]
        head, body = entry.split("{", 1)
        self.parameters = re.findall(r"\w+_param_\d+", head)
        required = re.search(r"\.reqntid (\d+)", ptx)
        assert required
        self.threads = int(required[1])
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in body[: body.index("\n}")].splitlines():
            text = line.split("//")[0].strip()
            if re.match(r"\$\w+:", text):
                self.labels[text[:-1]] = len(self.code)
            # Inline assembly is a block of several statements in one line.
            for statement in text.removeprefix("{").split(";")[:-1]:
                match = re.match(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement.strip())
                if match:
                    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[3])
                    self.code.append((match[1], match[2].split("."), operands))

    def run(
        self,
        memory: Sequence[tuple[int, Array]],
        arguments: Sequence[int],
        grid: tuple[int, int],
        shared_bytes: int,
        table_bytes: int,
    ) -> None:
        """Run all programs, one after the other.

        Args:
            memory: (address, bytes [n] uint8) of every buffer.
            arguments: one integer per parameter: addresses and sizes.
        """
        self.memory, self.grid = memory, grid
        self.shared_bytes, self.table_bytes = shared_bytes, table_bytes
        self.look_ups = self.look_up_conflicts = 0
        self.arguments = dict(zip(self.parameters, arguments, strict=True))
        for y in range(grid[1]):
            for x in range(grid[0]):
                self._run_program(x, y)

    def _all(self, value: int, bits: int = 32) -> Array:
        return np.full(self.threads, value & ((1 << bits) - 1), UNSIGNED[bits])

    def _run_program(self, x: int, y: int) -> None:
        self.shared, self.table = np.zeros(self.shared_bytes, np.uint8), -1
        self.registers: dict[str, Array] = {
            "%tid.x": np.arange(self.threads, dtype=U32),
            "%ctaid.x": self._all(x),
            "%ctaid.y": self._all(y),
            "%nctaid.x": self._all(self.grid[0]),
            "global_smem": self._all(SHARED),
        }
        at = 0
        while True:
            predicate, opcode, operands = self.code[at]
            at += 1
            self.mask = np.ones(self.threads, bool)
            if predicate:
                self.mask = self.registers[predicate.lstrip("!")] ^ predicate.startswith("!")
            if opcode[0] == "ret":
                return
            if opcode[0] == "bra":
                assert self.mask.all() or not self.mask.any(), "a branch that is not uniform"
                at = self.labels[operands[0]] if self.mask.all() else at
            else:
                with np.errstate(over="ignore"):
                    self._execute(opcode, operands)

    def _read(self, operand: str, bits: int = 32) -> Array:
        if operand in self.registers:
            value = self.registers[operand]
            return value if value.dtype == bool else value.astype(UNSIGNED[bits])
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return self._all(number, bits)

    def _read_float(self, operand: str) -> Array:
        return self._read(operand).view(np.float32)

    def _write(self, register: str, value: Array) -> None:
        if register != "_":
            old = self.registers.get(register, np.zeros_like(value))
            self.registers[register] = np.where(self.mask, value, old)

    def _execute(self, opcode: list[str], operands: list[str]) -> None:
        name, kind = opcode[0], opcode[-1]
        if name in ("bar", "griddepcontrol"):
            return
        bits = int(re.sub(r"\D", "", kind) or 32)
        target, sources = operands[0], operands[1:]
        if "prefetch" in opcode:
            self._prefetch(target, int(sources[0]))
        elif name == "mma":
            self._multiply_matrices(opcode, operands)
        elif name in ("ld", "st"):
            self._access(opcode, operands, bits)
        elif opcode == ["mov", "pred"]:
            self._write(target, self._all(int(sources[0])) != 0)
        elif name == "mov":
            self._move(target, sources[0], bits)
        elif kind == "pred":
            values = [self.registers[source] for source in sources]
            self._write(target, ~values[0] if name == "not" else BINARY[name](*values))
        elif name == "selp":
            a, b = (self._read(source, bits) for source in sources[:2])
            self._write(target, np.where(self.registers[sources[2]], a, b))
        elif name == "setp":
            dtype = SIGNED[bits] if kind[0] == "s" else UNSIGNED[bits]
            a, b = (self._read(source, bits).view(dtype) for source in sources)
            self._write(target, COMPARE[opcode[1]](a, b))
        elif kind == "f32" and name in ("add", "mul", "fma"):
            a, b, *rest = (self._read_float(source) for source in sources)
            value = a * b + rest[0] if name == "fma" else BINARY[name](a, b)
            self._write(target, value.astype(np.float32).view(U32))
        elif name == "cvt":
            self._write(target, self._convert(opcode[-2], kind, sources[0]))
        else:
            self._write(target, self._integer(opcode, kind, bits, sources))

    def _integer(self, opcode: list[str], kind: str, bits: int, sources: list[str]) -> Array:
        name, signed = opcode[0], kind[0] == "s"
        if name in ("mad", "mul") and opcode[1] == "wide":
            a, b = (
                self._read(s).view(np.int32 if signed else U32).astype(np.int64).view(np.uint64)
                for s in sources[:2]
            )
            return a * b + (self._read(sources[2], 64) if name == "mad" else np.uint64(0))
        a = self._read(sources[0], bits)
        if name == "shfl":
            assert opcode[2] == "bfly"
            return a[np.arange(self.threads) ^ int(sources[1])]
        if name == "not":
            return ~a
        if name == "neg":
            return ~a + a.dtype.type(1)
        b = self._read(sources[1], bits)
        if name == "mad":
            return a * b + self._read(sources[2], bits)
        if name == "prmt":
            both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
            places = self._read(sources[2])[:, None] >> U32([0, 4, 8, 12]) & U32(7)
            chosen = both.view(np.uint8).reshape(-1, 8)[np.arange(self.threads)[:, None], places]
            return chosen.copy().view(U32)[:, 0]
        if name == "bfe":
            return (a >> b) & ((U32(1) << self._read(sources[2])) - U32(1))
        if name == "shf":
            # Of the 64 bits b:a, the upper word after a shift to the left, the lower one after a
            # shift to the right.
            both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
            shift = (self._read(sources[2]) & U32(31)).astype(np.uint64)
            shifted = (both << shift) >> np.uint64(32) if opcode[1] == "l" else both >> shift
            return shifted.astype(U32)
        if signed and name in ("min", "max", "shr"):
            return BINARY[name](a.view(SIGNED[bits]), b.view(SIGNED[bits])).view(UNSIGNED[bits])
        return BINARY[name](a, b)

    def _convert(self, to: str, kind: str, source: str) -> Array:
        if kind == "bf16":
            return bf16_to_float(self._read(source, 16)).view(U32)
        if kind == "f16":
            return self._read(source, 16).view(np.float16).astype(np.float32).view(U32)
        if kind == "f32":
            value = self._read_float(source)
            if to == "bf16":
                return float_to_bf16(value)
            return value.astype(np.float16).view(np.uint16)
        bits, wide = int(kind[1:]), int(to[1:])
        value = self._read(source, bits)
        if kind[0] == "s":
            value = value.view(SIGNED[bits]).astype(SIGNED[wide])
        return value.astype(UNSIGNED[wide])

    def _move(self, target: str, source: str, bits: int) -> None:
        half = bits // 2
        if source.startswith("{"):
            low, high = (
                self._read(part.strip(), half).astype(UNSIGNED[bits])
                for part in source[1:-1].split(",")
            )
            self._write(target, low | high << UNSIGNED[bits](half))
        elif target.startswith("{"):
            value = self._read(source, bits)
            for i, part in enumerate(target[1:-1].split(",")):
                shifted = value >> UNSIGNED[bits](half * i)
                self._write(part.strip(), shifted.astype(UNSIGNED[half]))
        else:
            self._write(target, self._read(source, bits))

    def _access(self, opcode: list[str], operands: list[str], bits: int) -> None:
        load, space = opcode[0] == "ld", opcode[1].removesuffix("::cta")
        place, names = operands[::-1] if load else operands
        base, _, offset = place[1:-1].replace(" ", "").partition("+")
        if space == "param":
            self._write(names, self._all(self.arguments[base], bits))
            return
        registers = [name.strip() for name in names.strip("{}").split(",")]
        size = len(registers) * bits // 8
        address = self.registers[base].astype(np.int64) + int(offset or 0)
        if space == "shared":
            self._note_look_up(address, load, size)
        if not self.mask.any():
            return
        start, buffer = self._buffer(int(address[self.mask].min()))
        at = address[self.mask] - start
        beyond = at.max() + size - len(buffer)
        assert beyond <= 0, f"{opcode}: {beyond} bytes past the end of a buffer"
        assert not (address[self.mask] % size).any(), f"{opcode}: misaligned"
        bytes_at = at[:, None] + np.arange(size)
        if load:
            values = np.zeros((self.threads, len(registers)), UNSIGNED[bits])
            values[self.mask] = buffer[bytes_at].view(UNSIGNED[bits])
            for i, register in enumerate(registers):
                self._write(register, values[:, i])
        else:
            values = np.stack([self._read(register, bits) for register in registers], 1)
            buffer[bytes_at] = np.ascontiguousarray(values[self.mask]).view(np.uint8)

    def _prefetch(self, place: str, size: int) -> None:
        """Nothing is done, but what is not there must not be asked for."""
        for address in self.registers[place[1:-1]][self.mask].tolist():
            start, buffer = self._buffer(address)
            assert not address % 16 and not size % 16, f"prefetch at {address:#x}: misaligned"
            assert address + size <= start + len(buffer), "prefetch past the end of a buffer"

    def _note_look_up(self, address: Array, load: bool, size: int) -> None:
        """Count an access to shared memory that is a look-up in the table, and its conflicts."""
        if not load and self.table < 0:
            self.table = int(address.min())
        inside = (self.table <= address) & (address < self.table + self.table_bytes)
        if load and size == 4 and inside.all():
            self.look_ups += 1
            banks = (address // 4 % 32).reshape(-1, 32)
            most = max(int(np.bincount(lanes).max()) for lanes in banks)
            self.look_up_conflicts = max(self.look_up_conflicts, most)

    def _buffer(self, address: int) -> tuple[int, Array]:
        for start, buffer in ((SHARED, self.shared), *self.memory):
            if start <= address < start + len(buffer):
                return start, buffer
        raise AssertionError(f"nothing is stored at address {address:#x}")

    def _multiply_matrices(self, opcode: list[str], operands: list[str]) -> None:
        """m16n8k16: lane (g, t) = (lane / 4, lane % 4) holds rows g and g + 8, and columns g.

        Of k it holds 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
        """
        assert opcode[3:6] == ["m16n8k16", "row", "col"], opcode
        d, a, b, c = ([name.strip() for name in operand[1:-1].split(",")] for operand in operands)

        def halves(names: list[str]) -> Array:  # [warp, g, t, register, half]
            words = np.stack([self._read(name) for name in names], 1).reshape(-1, 8, 4, len(names))
            bits = np.stack([words & U32(0xFFFF), words >> U32(16)], -1).astype(np.uint16)
            if opcode[7] == "bf16":
                return bf16_to_float(bits)
            return bits.view(np.float16).astype(np.float32)

        left = halves(a).reshape(-1, 8, 4, 2, 2, 2)  # registers: k + 8, row + 8
        left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
        right = halves(b).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
        sums = (left @ right).reshape(-1, 2, 8, 4, 2)  # row + 8, column
        sums = sums.transpose(0, 2, 3, 1, 4).reshape(self.threads, 4)
        for i, name in enumerate(d):
            self._write(name, (self._read_float(c[i]) + sums[:, i]).astype(np.float32).view(U32))
