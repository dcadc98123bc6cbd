"""The Gluon kernel that decodes a weight into a matrix without a GPU: its PTX runs on the CPU."""

import pytest
import torch

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.format.codebook import TRELLIS
from qamw_kernels.ops.gluon import dequantize_launch
from qamw_kernels.ops.weight import Rate, TiledWeight
from tests.helpers.ptx.launcher import PtxLauncher
from tests.helpers.weights import random_weight

pytestmark = pytest.mark.skipif(
    dequantize_launch.kernels is None, reason="this Triton lacks what the kernel needs"
)

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
