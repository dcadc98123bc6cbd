"""The Gluon kernels for mixtures of experts without a GPU: their PTX is executed on the CPU."""

import collections
from typing import Any

import pytest
import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble, loops, registers
from qamw_kernels.codec.decode import decode_indices
from qamw_kernels.codec.rotation import rotate
from qamw_kernels.format.codebook import CODES, INDEX_BITS, TRELLIS
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.ops.gluon import narrow_launch, routed_launch, table, wide_launch
from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.routing import Routing, sort_slots
from qamw_kernels.ops.tiling import tile_planes
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.triton.rotate_kernels import rotate_kernel, rotate_many_kernel
from qamw_kernels.ops.weight import Rate, TiledWeight, entry_words
from tests.helpers.ptx.launcher import PtxLauncher, lanes_of_a_bank
from tests.kernels_.ops.test_wide import PAIRS_PER_THREAD, check_spills, filled_with_nan, swap

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not table.HAS_GATHER, reason="this Triton has no shared-memory gather"),
]
needs_wide = pytest.mark.skipif(
    routed_launch.wide_kernels is None, reason="this Triton lacks what the wide kernel needs"
)
HERE = (0, 2, 3, 5)  # of six experts, those of this rank


def experts_of(
    num_rows: int, num_inputs: int, rate: Rate, generator: torch.Generator
) -> tuple[TiledWeight, torch.Tensor]:
    """The experts that are here, and the exact weights [experts, N, K] of their rotated inputs."""
    size = len(HERE) * num_rows * num_inputs // 2
    order = torch.randperm(size, generator=generator)
    indices = (order % 2**rate.index_bits).view(len(HERE), num_rows, -1).short()
    planes = [pack_planes(own, rate.index_bits) for own in indices]
    tiles = torch.stack([tile_planes(own, rate.code) for own in planes])
    norms = torch.rand(len(HERE), num_rows, generator=generator) + 0.5
    scales = torch.ones(num_inputs).half()
    weight = TiledWeight(tiles, norms, scales, entry_words(*rate), 64)
    coordinates = torch.stack([decode_indices(own, *rate) for own in indices]).double()
    return weight, coordinates * norms[..., None].double()


def route(chosen: torch.Tensor, block_size: int) -> Routing:
    """All slots, those of other ranks too; unused blocks get an impossible number of an expert."""
    routing = sort_slots(chosen, block_size, 6)
    numbers = [HERE.index(expert) if expert in HERE else -1 for expert in range(6)]
    used = int(routing.num_sorted) // block_size
    experts = torch.full_like(routing.experts, 1 << 20)
    experts[:used] = torch.tensor(numbers, dtype=torch.int32)[routing.experts[:used]]
    return routing._replace(experts=experts)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] as the kernels rotate it, without input scales."""
    return rotate(x.float(), 64).to(x.dtype)


class RotatingLauncher(PtxLauncher):
    """Rotates in plain torch, and executes the products."""

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if kernel is rotate_kernel:
            x, _, out, *_ = arguments
            out.copy_(rotated(x))
        elif kernel is rotate_many_kernel:
            x, _, slots, num_sorted, out, num_slots, slots_per_token, *_ = arguments
            used = (slots[: int(num_sorted)] < num_slots).nonzero().flatten()
            out[used] = swap(rotated(x))[slots[used] // slots_per_token]
        else:
            super().launch(kernel, grid, *arguments, **constants)


FEW = [[0, 5]] * 9 + [[2, 1]]
MANY = [[i % 5, 5] for i in range(40)]
NARROW: dict[str, Any] = {
    # Experts of every token; slots of a token, rows, inputs, rate, dtype; seed of the warps' order.
    "one token": ([[3, 1]], 1, 70, 448, Rate(11), torch.bfloat16, None),
    "warps one by one": ([[3, 0], [2, 3]], 1, 70, 1024, Rate(11), torch.bfloat16, 1),
    "more than a block": (FEW, 1, 700, 768, Rate(6), torch.bfloat16, None),
    "a token for every slot": (
        [[5, 3], [0, 4], [5, 2]],
        2,
        150,
        768,
        Rate(11),
        torch.float16,
        None,
    ),
    "all experts elsewhere": ([[1, 4], [4, 1]], 1, 70, 448, Rate(6), torch.bfloat16, None),
    "trellis": (FEW, 1, 150, 768, Rate(11, TRELLIS), torch.bfloat16, None),
}
WIDE: dict[str, Any] = {
    # The same, after the number of slots in a block. If a block has several row blocks, some
    # programs continue from the end of one block to the next one.
    "one token": (16, [[3, 1]], 1, 70, 448, Rate(11), torch.bfloat16, None),
    "warps one by one": (16, [[3, 0], [2, 3], [5, 0]], 1, 300, 576, Rate(11), torch.bfloat16, 1),
    "in another order": (16, [[3, 0], [2, 3], [5, 0]], 1, 300, 576, Rate(11), torch.bfloat16, 2),
    "more than a block": (16, MANY, 1, 700, 768, Rate(6), torch.bfloat16, None),
    "a token for every slot": (32, FEW, 2, 300, 1088, Rate(11), torch.float16, None),
    "64 slots": (64, MANY, 1, 530, 576, Rate(11), torch.bfloat16, None),
    "the largest blocks": (128, [*MANY, *MANY], 1, 300, 576, Rate(12), torch.bfloat16, None),
    "all experts elsewhere": (16, [[1, 4], [4, 1]], 1, 70, 448, Rate(6), torch.bfloat16, None),
    "trellis": (16, FEW, 1, 300, 576, Rate(11, TRELLIS), torch.bfloat16, None),
    "trellis, the largest table": (32, MANY, 1, 70, 576, Rate(12, TRELLIS), torch.float16, None),
}
CASES = {f"narrow, {name}": (8, *case) for name, case in NARROW.items()}
CASES |= {f"wide, {name}": case for name, case in WIDE.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ptx_is_right(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block_size, rows, per_token, num_rows, num_inputs, rate, dtype, seed = case
    if routed_launch.is_wide(block_size) and routed_launch.wide_kernels is None:
        pytest.skip("this Triton lacks what the wide kernel needs")
    chosen = torch.tensor(rows, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    weight, exact = experts_of(num_rows, num_inputs, rate, generator)
    x = torch.randn(per_token * len(chosen), num_inputs, generator=generator).to(dtype)
    launcher = RotatingLauncher(3, seed)
    monkeypatch.setattr(torch, "empty", filled_with_nan)  # shows padding that is used
    y = launch.routed_linear(x, weight, route(chosen, block_size), chosen.numel(), launcher)
    expected = torch.zeros(y.shape, dtype=torch.float64)
    for slot, expert in enumerate(chosen.flatten().tolist()):
        if expert in HERE:
            token = rotated(x)[slot * len(x) // len(y)].double()
            expected[slot] = exact[HERE.index(expert)] @ token
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(y.double(), expected, rtol=step, atol=1e-3)
    assert (y == expected.to(dtype)).double().mean() > 0.99
    if seed is None and bool(expected.any()):
        assert launcher.machines[0].look_up_conflicts == lanes_of_a_bank(90, rate)


@pytest.mark.parametrize("rate", [Rate(6), Rate(12), Rate(11, TRELLIS)], ids=str)
def test_machine_code_of_narrow(rate: Rate) -> None:
    """No spills; every half tile is loaded once, past L1, and multiplied by the tensor cores."""
    processor = Processor(132, SHARED_BYTES[90], 90)
    constants = narrow_launch.constants(rate, torch.bfloat16, processor)
    compiled = compile_for(90, routed_launch.narrow_kernel, constants)
    opcodes = collections.Counter(opcode for opcode, _ in disassemble(compiled))
    assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], "spills"
    assert opcodes["LDG.E.128.STRONG.GPU"] == 2 * ((rate.entry_bits + 1) // 2 + 1)
    assert sum(n for opcode, n in opcodes.items() if opcode.startswith("HMMA")) == 16
    assert "griddepcontrol.wait" in compiled.asm["ptx"]


COMPILED = [(Rate(11), 16), (Rate(11), 64), (Rate(11), 128), (Rate(12), 128)]
COMPILED += [(Rate(11, TRELLIS), 16), (Rate(11, TRELLIS), 128)]
ALL = [
    (Rate(bits, code), slots)
    for code in CODES
    for bits in INDEX_BITS
    for slots in routed_launch.WIDE_SLOTS
]


@needs_wide
@pytest.mark.parametrize(
    "rate, slots",
    [*COMPILED, *(pytest.param(*x, marks=pytest.mark.matrix) for x in ALL if x not in COMPILED)],
)
def test_machine_code_of_wide(rate: Rate, slots: int) -> None:
    """The main loop is that of the wide kernel for linear layers: nothing is spilled."""
    assert routed_launch.wide_kernels is not None
    kernel = routed_launch.wide_kernels.routed_wide_gemm_kernel
    constants = wide_launch.constants(rate, torch.bfloat16, slots, SHARED_BYTES[90])
    compiled = compile_for(90, kernel, constants)
    instructions = disassemble(compiled)
    assert registers(compiled) <= constants["maxnreg"]
    main = next(body for body in loops(instructions) if body["LDS"] == PAIRS_PER_THREAD)
    check_spills(instructions, main, rate, slots)
    most = 9.5 if rate.code == TRELLIS else 9
    assert main.total() <= most * PAIRS_PER_THREAD, main
    loads = sum(n for opcode, n in main.items() if opcode.startswith("LDG"))
    assert loads == main["LDG.E.128.STRONG.GPU"] == rate.index_bits, main
    assert sum(n for opcode, n in main.items() if opcode.startswith("HGMMA")) == 32, main
    assert "griddepcontrol.wait" in compiled.asm["ptx"]


class Gpu:
    """A launcher that only knows a processor."""

    def __init__(self, compute_capability: int) -> None:
        shared = SHARED_BYTES[compute_capability]
        self._processor = Processor(132, shared, compute_capability)

    def processor(self, device: torch.device) -> Processor:
        return self._processor

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        raise AssertionError("nothing is launched here")


@pytest.mark.parametrize(
    "compute_capability, expected",
    [
        (90, [8, 8, 16, 16, 32, 32, 64, 128, 128]),
        (100, [8, 8, 8, 8, 8, 64, 64, 64, 64]),
        (89, [16, 16, 16, 16, 16, 64, 64, 64, 64]),
    ],
)
def test_block_sizes(compute_capability: int, expected: list[int]) -> None:
    """Most experts have one block; where no kernel here takes so many slots, it is a plain one."""
    generator = torch.Generator().manual_seed(0)
    weight, _ = experts_of(16, 768, Rate(11), generator)
    gpu = Gpu(compute_capability)

    def size(average: int, weight: TiledWeight = weight) -> int:
        return launch.routed_block_size(128 * average, 128, torch.bfloat16, [weight], gpu)

    found = [size(average) for average in (1, 4, 5, 10, 11, 24, 60, 61, 4096)]
    assert found == expected
    # More inputs than the narrow kernel takes.
    long, _ = experts_of(16, 32832, Rate(11), generator)
    assert size(1, long) == 16


def test_block_sizes_of_float32() -> None:
    weight, _ = experts_of(16, 768, Rate(11), torch.Generator().manual_seed(0))
    sizes = [launch.routed_block_size(n, 1, torch.float32, [weight], Gpu(90)) for n in (16, 17)]
    assert sizes == [16, 32]
