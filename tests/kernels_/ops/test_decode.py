"""The decode kernel in Gluon without a GPU: its PTX is executed on the CPU, its code counted."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble, loops
from qamw_kernels.format.codebook import INDEX_BITS, TRELLIS
from qamw_kernels.ops.gluon import decode_launch, table
from qamw_kernels.ops.weight import Rate
from tests.helpers.products import Product, check_rounded, random_product
from tests.helpers.ptx.launcher import lanes_of_a_bank
from tests.helpers.ptx.machine import Machine

needs_gluon = pytest.mark.skipif(
    not table.HAS_GATHER, reason="this Triton has no shared-memory gather, or is its interpreter"
)
PAIRS_PER_THREAD = 128  # of a tile


def compile_gemm(target: int, rate: Rate, dtype: torch.dtype, parts: int) -> Any:
    constants = decode_launch.constants(rate, dtype, parts, SHARED_BYTES[target])
    return compile_for(target, decode_launch.kernel, constants)


def as_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).copy()


def run_on_cpu(
    compiled: Any,
    table_bytes: int,
    product: Product,
    log: int,
    programs: int = 3,
) -> tuple[torch.Tensor, Machine]:
    """y [M, N], and the machine it was computed on."""
    weight, x, bias, _ = product
    y = torch.full((len(x), weight.num_rows), torch.nan, dtype=x.dtype)
    packed = (weight.tiles, weight.row_norms, weight.entry_words)
    tensors = (x, *packed, y if bias is None else bias)
    buffers = [as_bytes(t) for t in (*tensors, y)]
    machine = Machine(compiled.asm["ptx"])
    addresses = [(i + 1) << 32 for i in range(len(buffers))]
    sizes = [len(x), weight.num_rows, x.shape[1], int(bias is not None), log]
    machine.run(
        list(zip(addresses, buffers, strict=True)),
        [*addresses, *sizes, 0, 0],
        (programs, -(-len(x) // (8 * decode_launch.parts_of(len(x))))),
        compiled.metadata.shared,
        table_bytes,
    )
    return torch.from_numpy(buffers[-1]).view(x.dtype).view(y.shape), machine


SHAPES = [
    # Tokens, rows, inputs, log2 of the row tiles at once.
    (1, 70, 4608, 0),
    (8, 16, 448, 3),
    (13, 33, 4096, 1),
    (25, 40, 704, 1),
    (70, 100, 8704, 2),
]
DTYPES = [*((Rate(b), torch.bfloat16) for b in INDEX_BITS), (Rate(11), torch.float16)]
CASES = [(80, rate, dtype, shape) for rate, dtype in DTYPES for shape in SHAPES]
CASES += [
    (80, Rate(bits, TRELLIS), torch.bfloat16, shape)
    for bits, shape in zip((7, 11, 12), SHAPES[1:4], strict=True)
]
SMALL_TABLES = [
    (89, Rate(12), torch.bfloat16, SHAPES[1]),
    (89, Rate(12, TRELLIS), torch.float16, SHAPES[2]),
]
"""With 16 and 8 copies of every entry, where there is no room for 32."""
CASES += SMALL_TABLES


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("target, rate, dtype, shape", CASES, ids=str)
def test_ptx_is_right(
    target: int, rate: Rate, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """Whole tiles, tiles that some warps lack, tiles that the weight ends within.

    Several programs, row tiles at once or one by one, and parts.
    """
    num_tokens, num_rows, num_inputs, log = shape
    product = random_product(num_tokens, num_rows, num_inputs, rate, dtype, num_tokens > 1)
    compiled = compile_gemm(target, rate, dtype, decode_launch.parts_of(num_tokens))
    table_bytes = table.table_bytes(rate, SHARED_BYTES[target])
    y, machine = run_on_cpu(compiled, table_bytes, product, log)
    check_rounded(y, product.exact)
    assert machine.look_ups % PAIRS_PER_THREAD == 0 < machine.look_ups
    assert machine.look_up_conflicts == lanes_of_a_bank(target, rate)


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize(
    "rate", [*map(Rate, INDEX_BITS), *(Rate(b, TRELLIS) for b in (6, 11, 12))], ids=str
)
@pytest.mark.parametrize("target", [80, 89, 100])
def test_main_loop(target: int, rate: Rate) -> None:
    """The decode kernel is held to 7 instructions per pair for 16 tokens, or 7.5 of the trellis.

    On sm_90 other kernels run.
    """
    compiled = compile_gemm(target, rate, torch.bfloat16, 2)
    instructions = disassemble(compiled)
    spills = [opcode for opcode, _ in instructions if re.match("LDL|STL", opcode)]
    assert not spills or rate.code == TRELLIS  # of which the loop has none, see below
    assert compiled.metadata.shared <= decode_launch.shared_bytes(rate, SHARED_BYTES[target])
    decoding = [body for body in loops(instructions) if body["LDS"] == PAIRS_PER_THREAD]
    main = min(decoding, key=lambda body: body.total())
    trellis = rate.code == TRELLIS
    assert main.total() <= (7.5 if trellis else 7) * PAIRS_PER_THREAD, main
    loads = sum(n for opcode, n in main.items() if opcode.startswith("LDG"))
    wide = sum(n for op, n in main.items() if re.match(r"LDG\.E\.128", op))
    assert loads == wide == rate.index_bits + 32, main
    assert sum(n for opcode, n in main.items() if opcode.startswith("HMMA")) == 64, main
    assert not [opcode for opcode in main if re.match("LDL|STL|BAR|STS", opcode)], main
    assert sum(n for op, n in main.items() if op.startswith("SHFL")) == 2 * trellis, main


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("parts", [4, 8])
def test_nothing_is_spilled_in_the_loop(parts: int) -> None:
    """With 32 and 64 tokens some words are spilled, but not where it would cost."""
    instructions = disassemble(compile_gemm(80, Rate(11), torch.bfloat16, parts))
    main = min(
        (body for body in loops(instructions) if body["LDS"] == PAIRS_PER_THREAD),
        key=lambda body: body.total(),
    )
    assert not [opcode for opcode in main if re.match("LDL|STL", opcode)], main


def test_programs_fit_the_processor() -> None:
    """Two programs share a multiprocessor where their tables fit.

    11 bits do not on sm_89, 12 bits nowhere; nor do the sums of 64 tokens.
    """
    two = {
        target: [
            bits
            for bits in INDEX_BITS
            if decode_launch.programs_per_processor(Rate(bits), 1, size) == 2
        ]
        for target, size in SHARED_BYTES.items()
    }
    up_to_11 = [6, 7, 8, 9, 10, 11]
    assert two == {80: up_to_11, 89: [6, 7, 8, 9, 10], 90: up_to_11, 100: up_to_11}
    programs = [
        decode_launch.programs_per_processor(Rate(8), parts, SHARED_BYTES[90])
        for parts in decode_launch.PARTS
    ]
    assert programs == [2, 2, 1]


def test_warps_are_shared_out() -> None:
    """Llama-3-8B's and Llama-2-13B's layers on 264 programs.

    More row tiles at once where the inputs are no multiple of 4096.
    """

    def busy(num_rows: int, num_inputs: int) -> tuple[int, float]:
        """Row tiles at once, and the busiest program's rounds if all were equally busy, by its own.

        The second is 1 where no warp ever waits.
        """
        rows, inputs = num_rows // 16, num_inputs // 512
        log = decode_launch.log_row_tiles(rows, inputs, 264)
        rounds = -(-rows // (264 << log)) * -(-(inputs << log) // decode_launch.WARPS)
        return 1 << log, rows * inputs / (decode_launch.WARPS * 264 * rounds)

    assert busy(28672, 4096) == (1, pytest.approx(0.97, abs=0.01))
    assert busy(27648, 5120) == (4, pytest.approx(0.82, abs=0.01))  # one at a time: 0.58
    assert busy(15360, 5120) == (4, pytest.approx(0.91, abs=0.01))  # 0.57
