"""The decode kernel in Gluon without a GPU: its PTX is executed on the CPU, its code counted."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble, loops
from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.ops.gluon import decode_launch, table
from qamw_kernels.ops.tiling import tile_planes
from qamw_kernels.ops.weight import quadrant_words
from tests.helpers.products import Product, check_rounded, random_product
from tests.helpers.ptx.machine import Machine

needs_gluon = pytest.mark.skipif(
    not table.HAS_GATHER, reason="this Triton has no shared-memory gather, or is its interpreter"
)
PAIRS_PER_THREAD = 128  # of a tile


def compile_gemm(target: int, index_bits: int, dtype: torch.dtype, parts: int) -> Any:
    constants = decode_launch.constants(index_bits, dtype, parts, SHARED_BYTES[target])
    return compile_for(target, decode_launch.kernel, constants)


def as_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).copy()


def run_on_cpu(
    compiled: Any,
    product: Product,
    index_bits: int,
    log: int,
    programs: int = 3,
) -> tuple[torch.Tensor, Machine]:
    """y [M, N], and the machine it was computed on."""
    indices, x, row_norms, bias, _ = product
    tiles = tile_planes(pack_planes(indices, index_bits))
    y = torch.full((len(x), len(row_norms)), torch.nan, dtype=x.dtype)
    tensors = (x, tiles, row_norms, quadrant_words(index_bits, "cpu"), y if bias is None else bias)
    buffers = [as_bytes(t) for t in (*tensors, y)]
    machine = Machine(compiled.asm["ptx"])
    addresses = [(i + 1) << 32 for i in range(len(buffers))]
    sizes = [len(x), len(row_norms), x.shape[1], int(bias is not None), log]
    machine.run(
        list(zip(addresses, buffers, strict=True)),
        [*addresses, *sizes, 0, 0],
        (programs, -(-len(x) // (8 * decode_launch.parts_of(len(x))))),
        compiled.metadata.shared,
        128 << (index_bits - 2),
    )
    return torch.from_numpy(buffers[-1]).view(x.dtype).view(y.shape), machine


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize(
    "num_tokens, num_rows, num_inputs, log",
    [(1, 70, 4608, 0), (8, 16, 448, 3), (13, 33, 4096, 1), (25, 40, 704, 1), (70, 100, 8704, 2)],
)
@pytest.mark.parametrize(
    "index_bits, dtype",
    [*((b, torch.bfloat16) for b in INDEX_BITS), (11, torch.float16)],
    ids=str,
)
def test_ptx_is_right(
    index_bits: int,
    dtype: torch.dtype,
    num_tokens: int,
    num_rows: int,
    num_inputs: int,
    log: int,
) -> None:
    """Whole tiles, tiles that some warps lack, tiles that the weight ends within.

    Several programs, row tiles at once or one by one, and parts.
    """
    product = random_product(num_tokens, num_rows, num_inputs, index_bits, dtype, num_tokens > 1)
    compiled = compile_gemm(80, index_bits, dtype, decode_launch.parts_of(num_tokens))
    y, machine = run_on_cpu(compiled, product, index_bits, log)
    check_rounded(y, product.exact)
    assert machine.look_ups % PAIRS_PER_THREAD == 0 < machine.look_ups
    assert machine.look_up_conflicts == 1, "lanes of one bank"


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("index_bits", INDEX_BITS)
@pytest.mark.parametrize("target", [80, 89, 100])
def test_main_loop(target: int, index_bits: int) -> None:
    """The decode kernel is held to 7 instructions per pair for 16 tokens.

    On sm_90 other kernels run.
    """
    if decode_launch.shared_bytes(index_bits) > SHARED_BYTES[target]:
        pytest.skip("the table does not fit: the plain kernel runs")
    compiled = compile_gemm(target, index_bits, torch.bfloat16, 2)
    instructions = disassemble(compiled)
    assert not [opcode for opcode, _ in instructions if re.match("LDL|STL", opcode)], "spills"
    assert compiled.metadata.shared <= decode_launch.shared_bytes(index_bits)
    decoding = [body for body in loops(instructions) if body["LDS"] == PAIRS_PER_THREAD]
    main = min(decoding, key=lambda body: body.total())
    assert main.total() <= 7 * PAIRS_PER_THREAD, main
    loads = sum(n for opcode, n in main.items() if opcode.startswith("LDG"))
    wide = sum(n for op, n in main.items() if re.match(r"LDG\.E\.128", op))
    assert loads == wide == index_bits + 32, main
    assert sum(n for opcode, n in main.items() if opcode.startswith("HMMA")) == 64, main
    assert not [opcode for opcode in main if re.match("LDL|STL|SHFL|BAR|STS", opcode)], main


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("parts", [4, 8])
def test_nothing_is_spilled_in_the_loop(parts: int) -> None:
    """With 32 and 64 tokens some words are spilled, but not where it would cost."""
    instructions = disassemble(compile_gemm(80, 11, torch.bfloat16, parts))
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
            bits for bits in INDEX_BITS if decode_launch.programs_per_processor(bits, 1, size) == 2
        ]
        for target, size in SHARED_BYTES.items()
    }
    up_to_11 = [6, 7, 8, 9, 10, 11]
    assert two == {80: up_to_11, 89: [6, 7, 8, 9, 10], 90: up_to_11, 100: up_to_11}
    programs = [
        decode_launch.programs_per_processor(8, parts, SHARED_BYTES[90])
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
