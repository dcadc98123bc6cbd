"""The Gluon kernel for 9 to 1024 tokens without a GPU.

Its PTX is executed on the CPU, its machine code counted.
"""

import re
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble, loops, registers
from qamw_kernels.format.codebook import CODES, INDEX_BITS, TRELLIS
from qamw_kernels.ops.gluon import wide_launch
from qamw_kernels.ops.weight import Rate
from tests.helpers.products import check_rounded, random_product
from tests.helpers.ptx.launcher import PtxLauncher, lanes_of_a_bank

needs_wide = pytest.mark.skipif(
    wide_launch.kernels is None, reason="this Triton lacks what the kernel needs, or interprets"
)
PAIRS_PER_THREAD = 128  # of a tile


def swap(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] in the order of the kernel: bits 1 and 2 of the input change places with 3 and 4."""
    return x.view(len(x), -1, 4, 4, 2).transpose(2, 3).reshape(x.shape)


def multiply(
    num_tokens: int,
    num_rows: int,
    num_inputs: int,
    rate: Rate,
    dtype: torch.dtype,
    launcher: PtxLauncher,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] of random values, and the exact one in float64."""
    product = random_product(
        num_tokens, num_rows, num_inputs, rate, dtype, has_bias=num_tokens % 2 == 1
    )
    y = torch.full((num_tokens, num_rows), torch.nan, dtype=dtype)
    processor, x = launcher.processor(y.device), swap(product.x).contiguous()
    wide_launch.gemm(x, product.weight, product.bias, y, processor, launcher)
    return y, product.exact


def filled_with_nan(*args: Any, _empty: Any = torch.empty, **kwargs: Any) -> torch.Tensor:
    """torch.empty, but filled with NaN, which remains where nothing is written."""
    out: torch.Tensor = _empty(*args, **kwargs)
    return out.fill_(torch.nan) if out.is_floating_point() else out


def check_spills(
    instructions: list[tuple[str, str]], main: Counter[str], rate: Rate, tokens: int
) -> None:
    """Check that nothing is spilled; the trellis with 128 tokens may spill a few values that are
    read at most once a tile.
    """
    spilled = re.compile("LDL|STL")
    if rate.code == TRELLIS and tokens == 128:
        assert sum(n for opcode, n in main.items() if spilled.match(opcode)) <= 4, main
    else:
        assert not [opcode for opcode, _ in instructions if spilled.match(opcode)], "spills"


CASES = {
    # Inputs that end within a tile and within a block; with several programs, some have parts of
    # two row blocks. One by one, warps run in another order for every seed.
    "less than a tile": (13, 70, 64, Rate(11), torch.bfloat16, 1, None),
    "a whole row block and two parts": (16, 300, 1600, Rate(11), torch.bfloat16, 1, None),
    "warps one by one": (11, 150, 576, Rate(11), torch.bfloat16, 1, 1),
    "warps one by one, in another order": (11, 150, 576, Rate(11), torch.bfloat16, 1, 2),
    "33 tokens": (33, 150, 2112, Rate(11), torch.bfloat16, 4, None),
    "three groups of tokens": (520, 70, 576, Rate(11), torch.bfloat16, 6, None),
    "the smallest table": (32, 129, 1088, Rate(6), torch.float16, 2, None),
    "the largest table": (70, 129, 1088, Rate(12), torch.bfloat16, 3, None),
    "the smallest blocks of activations": (130, 129, 1088, Rate(12), torch.float16, 3, None),
    "trellis": (13, 150, 576, Rate(11, TRELLIS), torch.bfloat16, 1, None),
    "trellis, warps one by one": (40, 150, 576, Rate(7, TRELLIS), torch.float16, 2, 1),
    "trellis, the largest table": (70, 129, 1088, Rate(12, TRELLIS), torch.bfloat16, 3, None),
}
COMPILED = [(Rate(11), tokens) for tokens in (16, 64, 128, 256)]
COMPILED += [(Rate(12), 32), (Rate(12), 256)]
COMPILED += [(Rate(11, TRELLIS), 16), (Rate(11, TRELLIS), 128), (Rate(12, TRELLIS), 64)]
ALL = [
    (Rate(bits, code), tokens)
    for code in CODES
    for bits in INDEX_BITS
    for tokens in wide_launch.TILES
]


@needs_wide
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ptx_is_right(
    case: tuple[int, int, int, Rate, torch.dtype, int, int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_tokens, num_rows, num_inputs, rate, dtype, multiprocessors, seed = case
    launcher = PtxLauncher(multiprocessors, seed)
    monkeypatch.setattr(torch, "empty", filled_with_nan)  # shows what is read before it is written
    y, exact = multiply(num_tokens, num_rows, num_inputs, rate, dtype, launcher)
    check_rounded(y, exact)
    if seed is None:
        assert launcher.machines[0].look_ups % PAIRS_PER_THREAD == 0 < launcher.machines[0].look_ups
        assert launcher.machines[0].look_up_conflicts == lanes_of_a_bank(90, rate)


@needs_wide
@pytest.mark.slow
@pytest.mark.parametrize(
    "rate, tokens",
    [*COMPILED, *(pytest.param(*x, marks=pytest.mark.matrix) for x in ALL if x not in COMPILED)],
)
def test_main_loop(rate: Rate, tokens: int) -> None:
    """Every word is loaded and every pair looked up once, for all tokens of a program.

    At most 9 instructions per pair, or 9.5, and half of one more of the trellis; an H200 has time
    for 9.5 at its memory's speed.
    """
    assert wide_launch.kernels is not None
    constants = wide_launch.constants(rate, torch.bfloat16, tokens, SHARED_BYTES[90])
    compiled = compile_for(90, wide_launch.kernels.wide_gemm_kernel, constants)
    instructions = disassemble(compiled)
    assert registers(compiled) <= constants["maxnreg"]
    shape = wide_launch.shape_of(rate, tokens, SHARED_BYTES[90])
    main = next(body for body in loops(instructions) if body["LDS"] == PAIRS_PER_THREAD)
    check_spills(instructions, main, rate, tokens)
    # Blocks of few inputs have more barriers.
    most = 9.5 if constants["BLOCK_INPUTS"] < 128 else 9
    trellis = rate.code == TRELLIS
    assert main.total() <= (most + trellis / 2) * PAIRS_PER_THREAD, main
    loads = sum(n for opcode, n in main.items() if opcode.startswith("LDG"))
    assert loads == main["LDG.E.128.STRONG.GPU"] == rate.index_bits, main
    assert sum(n for opcode, n in main.items() if opcode.startswith("HGMMA")) == 32, main
    assert not [opcode for opcode in main if re.match("STS|STG", opcode)], main
    assert sum(n for op, n in main.items() if op.startswith("SHFL")) == 2 * trellis, main
    used = shape.tile.programs * (compiled.metadata.shared + wide_launch.RESERVED)
    assert used <= SHARED_BYTES[90] + wide_launch.RESERVED


def test_programs_fit_the_processor() -> None:
    """Two programs with up to 32 tokens share a multiprocessor, unless the table is too large."""
    found = {}
    for tokens in wide_launch.TILES:
        shapes = [
            wide_launch.shape_of(Rate(bits), tokens, SHARED_BYTES[90]) for bits in (8, 11, 12)
        ]
        found[tokens] = [(s.tile.programs, s.rows, s.block_inputs) for s in shapes]
    assert found == {
        16: [(2, 128, 256), (2, 128, 256), (1, 128, 256)],
        32: [(2, 128, 256), (2, 128, 256), (1, 128, 256)],
        64: [(1, 256, 256), (1, 256, 256), (1, 256, 256)],
        128: [(1, 256, 256), (1, 256, 256), (1, 128, 128)],
        256: [(1, 128, 128), (1, 128, 128), (1, 128, 64)],
    }


@pytest.mark.parametrize("programs", [33, 66, 132, 264])
@pytest.mark.parametrize("num_rows, num_inputs", [(6144, 4096), (28672, 4096), (4096, 14336)])
def test_work_is_shared_out(num_rows: int, num_inputs: int, programs: int) -> None:
    """The busiest program has little more than if all were equally busy.

    Llama-3-8B's layers; on a part of the programs if there are several groups of tokens.
    """
    row_blocks, input_tiles = num_rows // 128, num_inputs // 512
    share = wide_launch.share_out(row_blocks, input_tiles, programs)
    assert share.programs <= programs and share.grain in (1, input_tiles)
    units = row_blocks * input_tiles
    busiest = -(-units // share.grain // share.programs) * share.grain
    assert busiest <= -(-units // programs) + wide_launch.ADDING_UNITS
