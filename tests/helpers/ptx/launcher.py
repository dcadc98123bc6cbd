"""Launches Gluon and Triton kernels on the CPU, as the compiler makes them for a GPU."""

from typing import Any

import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for
from qamw_kernels.ops.gluon.table import copies
from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.weight import Rate
from tests.helpers.ptx.machine import Machine, TensorMap
from tests.helpers.ptx.registers import Array

COMPILED: dict[str, Any] = {}


def bytes_of(tensor: torch.Tensor) -> Array:
    """The memory of a contiguous tensor, not a copy."""
    assert tensor.is_contiguous()
    array: Array = tensor.view(-1).view(torch.uint8).numpy()
    return array


def lanes_of_a_bank(target: int, rate: Rate) -> int:
    """Lanes of a warp that look up in the same bank: more than 1 if the table has few copies."""
    return 32 // copies(rate, SHARED_BYTES[target])


class PtxLauncher:
    """Compiles for sm_90, and executes with tensors on the CPU.

    Attributes:
        machines: the machine of every launch, after it has run.
    """

    def __init__(self, multiprocessors: int, seed: int | None = None) -> None:
        self.machines: list[Machine] = []
        self._processor = Processor(multiprocessors, SHARED_BYTES[90], compute_capability=90)
        self._seed = seed

    def processor(self, device: torch.device) -> Processor:
        return self._processor

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        key = f"{kernel.__name__} {sorted(constants.items(), key=str)}"
        if key not in COMPILED:
            COMPILED[key] = compile_for(90, kernel, constants)
        compiled = COMPILED[key]
        memory: dict[int, Array] = {}
        flat: list[int | TensorMap] = []
        for argument in arguments:
            flat += self._parameters(argument, memory)
        machine = Machine(compiled.asm["ptx"])
        flat += [0] * (len(machine.code.parameters) - len(flat))  # scratch of Triton's own
        machine.run(
            list(memory.items()),
            flat,
            (grid[0], grid[1] if len(grid) > 1 else 1),
            compiled.metadata.shared,
            self._table_bytes(constants),
            self._seed,
        )
        self.machines.append(machine)

    @staticmethod
    def _table_bytes(constants: dict[str, Any]) -> int:
        return int(4 * constants.get("COPIES", 0) << constants.get("ENTRY_BITS", 0))

    @staticmethod
    def _parameters(argument: Any, memory: dict[int, Array]) -> list[int | TensorMap]:
        """The parameters for one argument; tensors are added to ``memory``, 4 GiB apart."""
        if isinstance(argument, int):
            return [argument]
        tensor = argument if isinstance(argument, torch.Tensor) else argument.base
        address = (len(memory) + 1) << 32
        memory[address] = bytes_of(tensor)
        if isinstance(argument, torch.Tensor):
            return [address]
        rows, columns = argument.shape
        box = (argument.block_shape[0], argument.layout.swizzle_byte_width // 2)
        return [TensorMap(address, (rows, columns), box), rows, columns, columns, 1]
