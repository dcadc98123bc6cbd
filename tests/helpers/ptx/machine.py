"""Runs the programs of a kernel."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.helpers.ptx.code import Code, Instruction, names
from tests.helpers.ptx.matrices import (
    columns_of,
    multiply_in_warpgroups,
    multiply_in_warps,
    second_operand_bytes,
)
from tests.helpers.ptx.registers import U32, UNSIGNED, Array, Registers, bits_of
from tests.helpers.ptx.shared import FIRST, UNIT, Shared

PARAMETERS = 1 << 24  # address of the first parameter, for those that are read by address


class TensorMap(NamedTuple):
    """A matrix of 16 bit floats, from which the copy engine copies boxes to shared memory.

    Attributes:
        address: of its buffer.
        shape: (rows, columns), contiguous.
        box: (rows, columns), 128 bytes wide; filled with zeros outside of the matrix.
    """

    address: int
    shape: tuple[int, int]
    box: tuple[int, int]


class Copy(NamedTuple):
    """A copy that has been started."""

    tensor_map: TensorMap
    column: int
    row: int
    to: int
    mbarrier: int
    clock: Array


class Group:
    """Warps that run in step.

    Attributes:
        at: number of the next instruction.
        state: "running", "barrier", "waiting" (for copies) or "done".
        products: groups of wgmma products that have not been waited for; of each product the
            instruction, its second operand's descriptor, and the warps' clocks at its start.
    """

    def __init__(self, registers: Registers, warps: Array) -> None:
        self.registers, self.warps = registers, warps
        self.at, self.state = 0, "running"
        self.products: list[list[tuple[Instruction, int, Array]]] = [[]]


class Machine:
    """One kernel.

    Attributes:
        look_ups: number of 32 bit loads from the table of ``table_bytes``; counted only if all
            warps run in step.
        look_up_conflicts: the largest number of lanes of a warp with the same bank in one of them.
    """

    def __init__(self, ptx: str) -> None:
        self.code = Code(ptx)

    def run(
        self,
        memory: Sequence[tuple[int, Array]],
        arguments: Sequence[int | TensorMap],
        grid: tuple[int, int],
        shared_bytes: int,
        table_bytes: int = 0,
        seed: int | None = None,
    ) -> None:
        """Run all programs, one after the other.

        Args:
            memory: (address, bytes [n] uint8) of every buffer.
            arguments: one per parameter: addresses, sizes, tensor maps.
            table_bytes: of the table for look-ups, which begins where shared memory is first
                written.
            seed: None to run all warps in step. Otherwise they run one by one in an order that
                depends on it, as do copies.
        """
        self.memory, self.grid, self.shared_bytes = memory, grid, shared_bytes
        self.table_bytes, self.order = table_bytes, None if seed is None else random.Random(seed)
        self.look_ups = self.look_up_conflicts = 0
        self.arguments = dict(zip(self.code.parameters, arguments, strict=True))
        self.places = {name: PARAMETERS + 256 * i for i, name in enumerate(self.code.parameters)}
        for y in range(grid[1]):
            for x in range(grid[0]):
                self._run_program(x, y)

    def _group(self, x: int, y: int, warps: Array) -> Group:
        count = 32 * len(warps)
        registers = Registers(count, {})
        registers.values |= {
            "%tid.x": np.arange(count, dtype=U32) + U32(32 * warps[0]),
            "%ctaid.x": registers.all(x),
            "%ctaid.y": registers.all(y),
            "%nctaid.x": registers.all(self.grid[0]),
            "global_smem": registers.all(FIRST),
        }
        registers.values |= {name: registers.all(at) for name, at in self.places.items()}
        return Group(registers, warps)

    def _run_program(self, x: int, y: int) -> None:
        num_warps = self.code.threads // 32
        self.shared, self.table = Shared(self.shared_bytes, num_warps), -1
        self.copies: list[Copy] = []
        together = num_warps if self.order is None else 1
        groups = [
            self._group(x, y, np.arange(first, first + together))
            for first in range(0, num_warps, together)
        ]
        waits = 0  # since a warp last ran
        while active := [group for group in groups if group.state != "done"]:
            if all(group.state == "barrier" for group in active):
                self.shared.join()
                for group in active:
                    group.state = "running"
            ready = [group for group in active if group.state == "running"]
            if ready:
                waits = 0
            else:
                ready = [group for group in active if group.state == "waiting"]
                waits += 1
                assert self.copies or waits < 1000, "all warps wait, and nothing is copied"
                if self.copies:
                    self._finish_a_copy()
            self._run_group(self.order.choice(ready) if self.order else ready[0])
        assert not self.copies, "a copy that nobody waited for"

    def _finish_a_copy(self) -> None:
        which = self.order.randrange(len(self.copies)) if self.order else 0
        tensor_map, column, row, to, mbarrier, clock = self.copies.pop(which)
        start, buffer = self._buffer(tensor_map.address)
        rows, columns = tensor_map.box
        assert columns == 64 and to % 1024 == 0
        box = np.zeros((rows, 128), np.uint8)
        inside = max(min(tensor_map.shape[0] - row, rows), 0)
        width = max(min(tensor_map.shape[1] - column, columns), 0)
        first = tensor_map.address - start
        matrix = buffer[first : first + 2 * tensor_map.shape[0] * tensor_map.shape[1]]
        matrix = matrix.reshape(tensor_map.shape[0], -1)
        box[:inside, : 2 * width] = matrix[row : row + inside, 2 * column : 2 * (column + width)]
        address = to + 128 * np.arange(rows)[:, None] + 16 * np.arange(8)
        address ^= (address >> 7 & 7) << 4
        barrier = self.shared.mbarriers[mbarrier]
        self.shared.store(address.reshape(-1), box.reshape(-1, 16), barrier, clock)

    def _run_group(self, group: Group) -> None:
        """Run until the group waits for others; with a seed, at most a random number of steps."""
        group.state = "running"
        left = self.order.randrange(1, 400) if self.order else -1
        while group.state == "running" and left:
            instruction = self.code.instructions[group.at]
            group.at += 1
            left -= 1
            registers, predicate = group.registers, instruction.predicate
            registers.mask = np.ones(registers.count, bool)
            if predicate:
                registers.mask = registers.values[predicate.lstrip("!")] ^ predicate.startswith("!")
            name = instruction.opcode[0]
            if name == "ret":
                assert not any(group.products), "products that nobody waited for"
                group.state = "done"
            elif name == "bra":
                assert registers.mask.all() or not registers.mask.any(), "threads part"
                group.at = instruction.target if registers.mask.all() else group.at
            else:
                with np.errstate(over="ignore"):
                    self._execute(group, instruction)

    def _execute(self, group: Group, instruction: Instruction) -> None:
        _, opcode, operands, _ = instruction
        name = opcode[0]
        if opcode[:2] == ["bar", "warp"]:
            # Nothing else to do: the lanes of a warp always run in step.
            assert operands == ["0xffffffff"], "not a barrier of a whole warp"
        elif name in ("bar", "barrier"):
            self._check_barrier(opcode, operands)
            group.state = "barrier"
        elif name == "mma":
            multiply_in_warps(group.registers, opcode, operands)
        elif name == "wgmma":
            self._wgmma(group, instruction)
        elif name == "mbarrier":
            self._mbarrier(group, opcode, operands)
        elif name == "griddepcontrol":
            pass  # nothing to wait for: kernels do not overlap here
        elif name == "fence":
            assert opcode[1:3] == ["proxy", "async"], opcode
            self.shared.fence(group.warps)
        elif "prefetch" in opcode:
            self._check_prefetch(group, *operands)
        elif name == "cp":
            self._start_copy(group, opcode, operands)
        elif name in ("ld", "st"):
            self._access(group, opcode, operands)
        else:
            group.registers.execute(opcode, operands)

    @staticmethod
    def _check_barrier(opcode: list[str], operands: list[str]) -> None:
        assert opcode[1] == "sync" and operands == ["0"], "not a barrier of the whole program"

    def _check_prefetch(self, group: Group, place: str, size: str = "") -> None:
        """A prefetch does nothing, but must not ask for memory outside of a buffer.

        Args:
            size: of a bulk prefetch in bytes; empty for one of the cache line that has ``place``.
        """
        for address in self._address(group, place)[group.registers.mask].tolist():
            start, buffer = self._buffer(address)
            if size:
                assert not address % 16 and not int(size) % 16, "prefetch: misaligned"
            assert address + int(size or 1) <= start + len(buffer), "prefetch: past the end"

    def _address(self, group: Group, operand: str) -> Array:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return group.registers.values[base].astype(np.int64) + int(offset or 0)

    def _mbarrier(self, group: Group, opcode: list[str], operands: list[str]) -> None:
        mask = group.registers.mask
        if not mask.any():
            return
        if opcode[1] == "init":
            address = int(self._address(group, operands[0])[mask][0])
            self.shared.add_mbarrier(address, int(operands[1]))
        elif opcode[1:3] == ["arrive", "expect_tx"]:
            address = self._address(group, operands[1])
            for thread in mask.nonzero()[0]:
                warp = int(group.warps[thread // 32])
                self.shared.arrive(int(address[thread]), warp, int(operands[2]))
        else:
            assert opcode[1:3] == ["try_wait", "parity"], opcode
            address, parity = self._address(group, operands[1]), group.registers.read(operands[2])
            complete = self.shared.complete(int(address[0]), int(parity[0]), group.warps)
            group.registers.write(operands[0], group.registers.all(complete) != 0)
            if not complete:
                group.state = "waiting"

    def _start_copy(self, group: Group, opcode: list[str], operands: list[str]) -> None:
        assert opcode[1:4] == ["async", "bulk", "tensor"], opcode
        matrix, column, row = operands[1].strip("[]").replace("{", "").replace("}", "").split(",")
        registers = group.registers
        for thread in registers.mask.nonzero()[0]:
            place = int(registers.values[matrix.strip()][thread])
            parameter = next(name for name, at in self.places.items() if at == place)
            tensor_map = self.arguments[parameter]
            assert isinstance(tensor_map, TensorMap)
            warp = int(group.warps[thread // 32])
            at = (
                int(registers.read(name.strip()).view(np.int32)[thread]) for name in (column, row)
            )
            to, mbarrier = (int(self._address(group, operands[i])[thread]) for i in (0, 2))
            clock = self.shared.clocks[warp].copy()
            self.copies.append(Copy(tensor_map, *at, to, mbarrier, clock))
            self.shared.tick(np.array([warp]))
            if self.order and self.order.random() < 0.5:
                self._finish_a_copy()

    def _wgmma(self, group: Group, instruction: Instruction) -> None:
        """Products are computed as late as possible: when they are waited for."""
        kind, operands = instruction.opcode[1], instruction.operands
        if kind == "mma_async":
            descriptor = group.registers.values[operands[2]]
            assert (descriptor == descriptor[0]).all()
            at = second_operand_bytes(int(descriptor[0]), columns_of(instruction.opcode))
            self.shared.check_fenced(at // UNIT)
            known = self.shared.clocks[group.warps].copy()
            group.products[-1].append((instruction, int(descriptor[0]), known))
        elif kind == "commit_group":
            group.products.append([])
        elif kind == "wait_group":
            done = max(len(group.products) - 1 - int(operands[0]), 0)
            for products in group.products[:done]:
                for product in products:
                    self._multiply(group, *product)
            group.products = group.products[done:]
        else:
            assert kind == "fence", instruction

    def _multiply(
        self, group: Group, instruction: Instruction, descriptor: int, known: Array
    ) -> None:
        at = second_operand_bytes(descriptor, columns_of(instruction.opcode))
        units = np.unique(at // UNIT)
        for warp, clock in zip(group.warps, known, strict=True):
            warps = np.full(len(units), warp)
            self.shared.read(units, warps, np.broadcast_to(clock, (len(units), len(clock))))
        right = self.shared.data[at[..., None] + np.arange(2)].view(np.uint16)[..., 0]
        multiply_in_warpgroups(group.registers, instruction.opcode, instruction.operands, right)

    def _access(self, group: Group, opcode: list[str], operands: list[str]) -> None:
        load, space = opcode[0] == "ld", opcode[1].removesuffix("::cta")
        bits, registers = bits_of(opcode[-1]), group.registers
        place, list_ = operands[::-1] if load else operands
        if space == "param":
            argument = self.arguments[place.strip("[]")]
            assert isinstance(argument, int)
            registers.write(list_, registers.all(argument, bits))
            return
        targets = names(list_)
        size = len(targets) * bits // 8
        address = self._address(group, place)
        if space == "shared" and self.order is None:
            self._note_look_up(address, load, size)
        mask = registers.mask
        if not mask.any():
            return
        start, buffer = (
            (FIRST, self.shared.data)
            if space == "shared"
            else self._buffer(int(address[mask].min()))
        )
        at = address[mask] - start
        assert at.min() >= 0 and at.max() + size <= len(buffer), f"{opcode}: past the end"
        assert not (address[mask] % size).any(), f"{opcode}: misaligned"
        if space == "shared":
            self._note_access(group, at, load, size)
        bytes_at = at[:, None] + np.arange(size)
        if load:
            values = np.zeros((registers.count, len(targets)), UNSIGNED[bits])
            values[mask] = buffer[bytes_at].view(UNSIGNED[bits])
            for i, register in enumerate(targets):
                registers.write(register, values[:, i])
        else:
            values = np.stack([registers.read(register, bits) for register in targets], 1)
            buffer[bytes_at] = np.ascontiguousarray(values[mask]).view(np.uint8)

    def _note_access(self, group: Group, at: Array, load: bool, size: int) -> None:
        """Check the accesses of the threads in the mask for races, and record them."""
        per_access = size // UNIT
        units = (at[:, None] // UNIT + np.arange(per_access)).reshape(-1)
        warps = group.warps[group.registers.mask.nonzero()[0] // 32].repeat(per_access)
        if load:
            self.shared.read(units, warps)
        else:
            clocks = self.shared.clocks
            self.shared.write(units, warps, clocks[warps], clocks[warps, warps])

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
        for start, buffer in self.memory:
            if start <= address < start + len(buffer):
                return start, buffer
        raise AssertionError(f"nothing is stored at address {address:#x}")
