"""The products on a GPU, with the kernels that its compute capability has.

Their compiled code is executed on the CPU elsewhere; here it is the GPU's memory and timing that
count: many programs, copies that are really asynchronous, launches that overlap, CUDA graphs.
"""

import functools

import pytest
import torch

from benchmarks.kernels.check import exact, random_weight
from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.ops.linear import linear
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.weight import TiledWeight
from tests.kernels_.ops.triton_checks.common import DEVICE, random

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = [(40, 128), (100, 640), (4104, 1536), (6144, 4096), (2050, 14336)]
"""Rows and inputs: less than a tile, parts of tiles, row blocks that programs share."""
TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 257, 512, 1024)
CLOSE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
REPEATS = 8


def assert_close(got: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    """Check that the dtype explains the relative error of every token and of every row.

    The error over few numbers may be larger by chance.
    """
    error, limit = got.double() - expected, CLOSE[got.dtype]
    for dim in (0, 1):
        size = expected.norm(dim=dim)
        size = size.clamp(min=float(size.mean()) / 2)
        worst = float((error.norm(dim=dim) / size).max())
        few = max(1.0, 8 / error.shape[dim] ** 0.5)
        assert worst < few * limit, f"{message}: relative error {worst:.2g} along {dim}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_bits", INDEX_BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_and_the_same_every_time(
    shape: tuple[int, int], index_bits: int, dtype: torch.dtype
) -> None:
    """Results that change from one time to the next would be a race."""
    torch.manual_seed(0)
    num_rows, num_inputs = shape
    weight = random_weight(num_rows, num_inputs, index_bits, DEVICE)
    inputs = random(max(TOKENS), num_inputs, dtype=dtype)
    bias = random(num_rows, dtype=dtype, seed=2)
    expected = exact(weight, inputs)
    for num_tokens in TOKENS:
        has_bias = num_tokens % 2 == 1
        x, given = inputs[:num_tokens], bias if has_bias else None
        got = launch.multiply_packed(x, weight, given)
        message = f"{num_tokens} tokens, {num_rows} x {num_inputs}, b = {index_bits}"
        assert_close(got, expected[:num_tokens] + (bias.double() if has_bias else 0), message)
        for _ in range(REPEATS):
            assert torch.equal(launch.multiply_packed(x, weight, given), got), message


@pytest.mark.parametrize("num_tokens", [1, 8, 16, 64, 200])
def test_in_a_graph(num_tokens: int) -> None:
    """Layers after each other, captured once and replayed with other inputs."""
    torch.manual_seed(0)
    layers = [random_weight(1536, 1536, 11, DEVICE) for _ in range(4)]
    x = random(num_tokens, 1536, dtype=torch.bfloat16)

    def all_layers(x: torch.Tensor) -> torch.Tensor:
        return functools.reduce(_layer, layers, x)

    all_layers(x)  # everything is compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = all_layers(x)
    for seed in range(REPEATS):
        x.copy_(random(num_tokens, 1536, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        replayed = y.clone()
        assert torch.equal(replayed, all_layers(x))


def _layer(x: torch.Tensor, weight: TiledWeight) -> torch.Tensor:
    y = linear(x, weight)
    return y / y.float().square().mean().sqrt().to(y.dtype)
