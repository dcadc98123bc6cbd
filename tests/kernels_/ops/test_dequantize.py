"""The Gluon kernel that decodes a weight into a matrix without a GPU: its PTX runs on the CPU."""

import re

import pytest
import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble, loops
from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.format.codebook import TRELLIS
from qamw_kernels.ops.gluon import dequantize_launch
from qamw_kernels.ops.weight import Rate, TiledWeight
from tests.helpers.ptx.launcher import PtxLauncher
from tests.helpers.weights import random_weight

pytestmark = pytest.mark.skipif(
    dequantize_launch.kernels is None, reason="this Triton lacks what the kernel needs"
)

PAIRS_PER_THREAD = 128  # in a unit

CASES = {
    # Rows and inputs end within a tile; with several programs, some begin within a row block.
    "less than a tile": (70, 64, Rate(11), 64, torch.bfloat16, 1, None),
    "several programs": (270, 1152, Rate(11), 128, torch.bfloat16, 3, None),
    "warps one by one": (150, 640, Rate(11), 128, torch.bfloat16, 1, 1),
    "the smallest table and blocks": (40, 576, Rate(6), 16, torch.float16, 1, None),
    "the largest table": (33, 640, Rate(12), 32, torch.float16, 2, None),
    "trellis": (70, 576, Rate(11, TRELLIS), 64, torch.bfloat16, 2, None),
    "trellis, the largest table": (33, 640, Rate(12, TRELLIS), 128, torch.float16, 1, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ptx_is_right(case: tuple[int, int, Rate, int, torch.dtype, int, int | None]) -> None:
    num_rows, num_inputs, rate, block_size, dtype, multiprocessors, seed = case
    launcher = PtxLauncher(multiprocessors, seed)
    weight = random_weight(num_rows, num_inputs, rate.index_bits, block_size, code=rate.code)
    out = torch.full((num_rows, num_inputs), torch.nan, dtype=dtype)
    processor = launcher.processor(out.device)
    assert dequantize_launch.fits(dtype, rate, block_size, processor)
    dequantize_launch.dequantize(TiledWeight.of(weight), out, processor, launcher)
    exact = decode_weight(weight)
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.float(), exact, rtol=step, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", dequantize_launch.table.DTYPES, ids=str)
@pytest.mark.parametrize("rate", [Rate(6), Rate(8), Rate(12), Rate(12, TRELLIS)], ids=str)
def test_main_loop(rate: Rate, dtype: torch.dtype) -> None:
    """At most 16 instructions per pair, with those that rotate and store; nothing is spilled."""
    assert dequantize_launch.kernels is not None
    constants = dequantize_launch.constants(rate, 128, dtype, SHARED_BYTES[90])
    compiled = compile_for(90, dequantize_launch.kernels.dequantize_kernel, constants)
    instructions = disassemble(compiled)
    main = next(body for body in loops(instructions) if body["LDS"] == PAIRS_PER_THREAD)
    assert main.total() <= 16 * PAIRS_PER_THREAD, main
    assert not [opcode for opcode, _ in instructions if re.match("LDL|STL", opcode)], "spills"
    words = sum(n for opcode, n in main.items() if opcode.startswith("LDG.E.128"))
    assert words == rate.index_bits + 16, main  # and the scales of 8 outputs
    assert main["STG.E.128"] == 32, main
