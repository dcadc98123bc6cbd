"""The Gluon kernel for up to 8 tokens, without a GPU: its PTX is executed on the CPU."""

import collections
import re
from typing import Any

import pytest
import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble
from qamw_kernels.format.codebook import INDEX_BITS, TRELLIS
from qamw_kernels.ops.gluon import narrow_launch, table
from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.weight import Rate
from tests.helpers.products import Product, check_rounded, random_product
from tests.helpers.ptx.launcher import lanes_of_a_bank
from tests.helpers.ptx.machine import Machine
from tests.kernels_.ops.test_decode import SMALL_TABLES, as_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not table.HAS_GATHER, reason="this Triton has no shared-memory gather"),
]
PAIRS_PER_THREAD = 64  # of half a tile


def processor(target: int) -> Processor:
    return Processor(132, SHARED_BYTES[target], target)


def compile_gemm(target: int, rate: Rate, dtype: torch.dtype) -> Any:
    constants = narrow_launch.constants(rate, dtype, processor(target))
    return compile_for(target, narrow_launch.kernel, constants)


def run_on_cpu(
    compiled: Any,
    table_bytes: int,
    product: Product,
    run: int,
    batch: int,
) -> tuple[torch.Tensor, Machine]:
    """y [M, N], and the machine it was computed on."""
    weight, x, bias, _ = product
    y = torch.full((len(x), weight.num_rows), torch.nan, dtype=x.dtype)
    packed = (weight.tiles, weight.row_norms, weight.entry_words)
    tensors = (x, *packed, y if bias is None else bias)
    buffers = [as_bytes(t) for t in (*tensors, y)]
    machine = Machine(compiled.asm["ptx"])
    addresses = [(i + 1) << 32 for i in range(len(buffers))]
    sizes = [len(x), weight.num_rows, x.shape[1], int(bias is not None), run, batch]
    machine.run(
        list(zip(addresses, buffers, strict=True)),
        [*addresses, *sizes, 0, 0],
        (-(-len(weight.tiles) // run), 1),
        compiled.metadata.shared,
        table_bytes,
    )
    return torch.from_numpy(buffers[-1]).view(x.dtype).view(y.shape), machine


SHAPES = [
    # Tokens, rows, inputs, row tiles of a program and of a batch.
    (1, 70, 4096, 3, 8),  # whole tiles, two programs
    (3, 33, 448, 2, 2),  # less than a tile, and a batch for each two row tiles
    (8, 100, 4672, 7, 4),  # two slices, of which the second is nearly empty; two batches
]
DTYPES = [
    *((90, Rate(b), torch.bfloat16) for b in INDEX_BITS),
    (90, Rate(11), torch.float16),
    (80, Rate(11), torch.bfloat16),
]
CASES = [(*case, shape) for case in DTYPES for shape in SHAPES]
CASES += [
    (90, Rate(bits, TRELLIS), torch.bfloat16, shape)
    for bits, shape in zip((12, 7, 11), SHAPES, strict=True)
]
FEW_SLOTS = [(3, 33, 448, 2, 2), (8, 100, 4672, 7, 2)]
CASES += [(*case[:3], shape) for case, shape in zip(SMALL_TABLES, FEW_SLOTS, strict=True)]


@pytest.mark.parametrize("target, rate, dtype, shape", CASES, ids=str)
def test_ptx_is_right(
    target: int, rate: Rate, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    num_tokens, num_rows, num_inputs, run, batch = shape
    has_bias = num_tokens > 1
    product = random_product(num_tokens, num_rows, num_inputs, rate, dtype, has_bias)
    compiled = compile_gemm(target, rate, dtype)
    table_bytes = table.table_bytes(rate, SHARED_BYTES[target])
    y, machine = run_on_cpu(compiled, table_bytes, product, run, batch)
    check_rounded(y, product.exact)
    assert machine.look_ups % PAIRS_PER_THREAD == 0 < machine.look_ups
    assert machine.look_up_conflicts == lanes_of_a_bank(target, rate)


@pytest.mark.parametrize(
    "rate", [Rate(6), Rate(11), Rate(12), Rate(11, TRELLIS), Rate(12, TRELLIS)], ids=str
)
@pytest.mark.parametrize("target", [80, 89, 90, 100])
def test_machine_code(target: int, rate: Rate) -> None:
    """No spills, tensor cores, 16-byte loads past L1; prefetches and dependence from sm_90 on."""
    compiled = compile_gemm(target, rate, torch.bfloat16)
    opcodes = collections.Counter(opcode for opcode, _ in disassemble(compiled))
    assert not [opcode for opcode in opcodes if re.match("LDL|STL", opcode)], "spills"
    assert opcodes["LDG.E.128.STRONG.GPU"] == 2 * ((rate.entry_bits + 1) // 2 + 1)
    assert sum(n for opcode, n in opcodes.items() if opcode.startswith("HMMA")) == 16
    assert compiled.metadata.shared <= SHARED_BYTES[target]
    hopper = target >= 90
    assert opcodes["CCTL.E.PF2"] == 2  # row norms and biases
    assert ("UBLKPF" in {opcode.split(".")[0] for opcode in opcodes}) == hopper
    assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == hopper


def test_the_table_has_as_many_copies_as_fit() -> None:
    """Of 9, 10 and 11 bits of an entry."""
    rates = (Rate(11), Rate(12), Rate(12, TRELLIS))
    found = {
        target: [table.copies(rate, size) for rate in rates]
        for target, size in SHARED_BYTES.items()
    }
    assert found == {80: [32, 32, 16], 89: [32, 16, 8], 90: [32, 32, 16], 100: [32, 32, 16]}


def test_slots_fit_beside_the_table() -> None:
    """One program of 16 warps on every device, at every rate."""
    found = {
        target: [narrow_launch.slots(Rate(bits), size) for bits in (6, 10, 11, 12)]
        for target, size in SHARED_BYTES.items()
    }
    assert found == {80: [8, 8, 8, 4], 89: [8, 8, 4, 4], 90: [8, 8, 8, 8], 100: [8, 8, 8, 8]}


def test_the_kernel_takes_few_tokens_and_inputs_that_fit_its_slots() -> None:
    def fits(num_tokens: int, num_inputs: int, target: int = 90, index_bits: int = 11) -> bool:
        gpu = processor(target)
        return narrow_launch.fits(num_tokens, num_inputs, torch.bfloat16, Rate(index_bits), gpu)

    assert fits(1, 64) and fits(8, 32768)
    assert not fits(9, 64) and not fits(8, 32832)
    assert fits(8, 16384, target=89) and not fits(8, 16448, target=89)
    assert fits(8, 16384, target=89, index_bits=12)
