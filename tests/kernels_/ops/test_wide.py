"""The Gluon kernel for 9 to 512 tokens without a GPU.

Its PTX is executed on the CPU, its machine code counted.
"""

import collections
import re

import pytest
import torch

from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble, loops
from qamw_kernels.format.codebook import INDEX_BITS, load_codebook
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.ops.gluon import wide_launch
from qamw_kernels.ops.tiling import tile_planes
from qamw_kernels.ops.weight import TiledWeight, quadrant_words
from tests.helpers.ptx.launcher import PtxLauncher

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
    index_bits: int,
    dtype: torch.dtype,
    with_bias: bool,
    launcher: PtxLauncher,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] of random values, and the exact one in float64."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_rows * num_inputs // 2, generator=generator)
    indices = (order % 2**index_bits).view(num_rows, -1)
    x = torch.randn(num_tokens, num_inputs, generator=generator).to(dtype)
    weight = TiledWeight(
        tile_planes(pack_planes(indices, index_bits)),
        torch.rand(num_rows, generator=generator) + 0.5,
        torch.ones(num_inputs).half(),
        quadrant_words(index_bits),
        64,
    )
    bias = torch.randn(num_rows, generator=generator).to(dtype) if with_bias else None
    y = torch.full((num_tokens, num_rows), torch.nan, dtype=dtype)
    processor = launcher.processor(y.device)
    wide_launch.gemm(swap(x).contiguous(), weight, bias, y, processor, launcher)
    coordinates = load_codebook(index_bits)[indices].flatten(1).double()
    exact = x.double() @ coordinates.T * weight.row_norms.double()
    return y, exact if bias is None else exact + bias.double()


@needs_wide
@pytest.mark.slow
@pytest.mark.parametrize(
    "num_tokens, num_rows, num_inputs, multiprocessors, index_bits, dtype",
    [
        (13, 70, 64, 4, 11, torch.bfloat16),
    ],
)
def test_ptx_is_right(num_tokens, num_rows, num_inputs, multiprocessors, index_bits, dtype) -> None:
    launcher = PtxLauncher(multiprocessors)
    y, exact = multiply(num_tokens, num_rows, num_inputs, index_bits, dtype, True, launcher)
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(y.double(), exact, rtol=step, atol=1e-3)
    assert (y == exact.to(dtype)).double().mean() > 0.99
