"""The Gluon kernels for mixtures of experts without a GPU: their PTX is executed on the CPU."""

import collections
from typing import Any

import pytest
import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble
from qamw_kernels.format.codebook import load_codebook
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.ops.gluon import narrow_launch, routed_launch, table
from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.routing import Routing, sort_slots
from qamw_kernels.ops.tiling import tile_planes
from qamw_kernels.ops.weight import TiledWeight, quadrant_words
from tests.helpers.ptx.launcher import PtxLauncher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not table.HAS_GATHER, reason="this Triton has no shared-memory gather"),
]
HERE = (0, 2, 3, 5)  # of six experts, those of this rank


def experts_of(
    num_rows: int, num_inputs: int, index_bits: int, generator: torch.Generator
) -> tuple[TiledWeight, torch.Tensor]:
    """The experts that are here, and the exact weights [experts, N, K] of their rotated inputs."""
    size = len(HERE) * num_rows * num_inputs // 2
    order = torch.randperm(size, generator=generator)
    indices = (order % 2**index_bits).view(len(HERE), num_rows, -1)
    tiles = torch.stack([tile_planes(pack_planes(own, index_bits)) for own in indices])
    norms = torch.rand(len(HERE), num_rows, generator=generator) + 0.5
    scales = torch.ones(num_inputs).half()
    weight = TiledWeight(tiles, norms, scales, quadrant_words(index_bits), 64)
    coordinates = load_codebook(index_bits)[indices].flatten(2).double()
    return weight, coordinates * norms[..., None].double()


def route(chosen: torch.Tensor, block_size: int) -> Routing:
    """All slots, those of other ranks too; blocks behind the last have experts that cannot be."""
    routing = sort_slots(chosen, block_size, 6)
    numbers = [HERE.index(expert) if expert in HERE else -1 for expert in range(6)]
    used = int(routing.num_sorted) // block_size
    experts = torch.full_like(routing.experts, 1 << 20)
    experts[:used] = torch.tensor(numbers, dtype=torch.int32)[routing.experts[:used]]
    return routing._replace(experts=experts)


CASES: dict[str, tuple[list[list[int]], int, int, int, int, torch.dtype, int | None]] = {
    # Experts of every token; slots of a token, rows, inputs, index bits; the order of warps.
    "one token": ([[3, 1]], 1, 70, 448, 11, torch.bfloat16, None),
    "warps one by one": ([[3, 0], [2, 3]], 1, 70, 1024, 11, torch.bfloat16, 1),
    "more than a block": ([[0, 5]] * 9 + [[2, 1]], 1, 700, 768, 6, torch.bfloat16, None),
    "a token for every slot": ([[5, 3], [0, 4], [5, 2]], 2, 150, 768, 11, torch.float16, None),
    "all experts elsewhere": ([[1, 4], [4, 1]], 1, 70, 448, 6, torch.bfloat16, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ptx_is_right(case: Any) -> None:
    rows, per_token, num_rows, num_inputs, index_bits, dtype, seed = case
    chosen = torch.tensor(rows, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    weight, exact = experts_of(num_rows, num_inputs, index_bits, generator)
    x = torch.randn(per_token * len(chosen), num_inputs, generator=generator).to(dtype)
    y = torch.zeros(chosen.numel(), num_rows, dtype=dtype)
    launcher = PtxLauncher(3, seed)
    routing = route(chosen, 8)
    processor = launcher.processor(y.device)
    routed_launch.gemm(x, weight, routing, y, processor, launcher)
    expected = torch.zeros(y.shape, dtype=torch.float64)
    for slot, expert in enumerate(chosen.flatten().tolist()):
        if expert in HERE:
            token = x[slot * len(x) // len(y)].double()
            expected[slot] = exact[HERE.index(expert)] @ token
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(y.double(), expected, rtol=step, atol=1e-3)
    assert (y == expected.to(dtype)).double().mean() > 0.99
    if seed is None and bool(expected.any()):
        assert launcher.machines[0].look_up_conflicts == 1, "lanes of one bank"


@pytest.mark.parametrize("index_bits", [6, 12])
def test_machine_code(index_bits: int) -> None:
    """No spills; every half tile is loaded once, past L1, and multiplied by the tensor cores."""
    processor = Processor(132, SHARED_BYTES[90], 90)
    constants = narrow_launch.constants(index_bits, torch.bfloat16, processor)
    compiled = compile_for(90, routed_launch.narrow_kernel, constants)
    opcodes = collections.Counter(opcode for opcode, _ in disassemble(compiled))
    assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], "spills"
    assert opcodes["LDG.E.128.STRONG.GPU"] == 2 * ((index_bits - 1) // 2 + 1)
    assert sum(n for opcode, n in opcodes.items() if opcode.startswith("HMMA")) == 16
    assert "griddepcontrol.wait" in compiled.asm["ptx"]


def test_many_slots_of_an_expert_are_left_to_the_plain_kernel() -> None:
    def fits(target: int, num_inputs: int = 768, block_size: int = 8) -> bool:
        gpu = Processor(132, SHARED_BYTES[target], target)
        return routed_launch.fits(block_size, num_inputs, torch.bfloat16, 11, gpu)

    assert routed_launch.block_size(16 * 128, 128) == 8
    assert routed_launch.block_size(16 * 128 + 1, 128) == 0
    assert fits(90) and fits(100)
    assert not fits(89) and not fits(90, num_inputs=32832) and not fits(90, block_size=16)
