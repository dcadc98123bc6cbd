"""Inputs of the checks, and the tolerance: what torch itself loses in the same dtype."""

import torch

from qamw_kernels.codec.decode import decode_coordinates
from qamw_kernels.format.codebook import PLAIN
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.linear import linear as tiled_linear
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.weight import TiledWeight
from tests.helpers import weights

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_ROWS = 100  # not a multiple of any BLOCK_N


def random_weight(
    num_rows: int,
    num_inputs: int,
    index_bits: int,
    rotation_block_size: int = 64,
    seed: int = 0,
    code: str = PLAIN,
) -> QuantizedWeight:
    """As :func:`tests.helpers.weights.random_weight`, on the device of the checks."""
    return weights.random_weight(
        num_rows, num_inputs, index_bits, rotation_block_size, seed, DEVICE, code
    )


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Gaussian numbers on the device of the checks."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype)


def coordinates(weight: QuantizedWeight) -> torch.Tensor:
    """[N, K] float32."""
    return decode_coordinates(weight)


def assert_as_good_as_torch(got: torch.Tensor, of_torch: torch.Tensor, exact: torch.Tensor) -> None:
    """The error of ``got`` against ``exact`` (float64) is at most twice that of torch.

    Errors are norms, and torch computes in the same dtype. In float32 on a GPU, where torch's
    library may add in another order, ten more roundings are allowed.
    """
    assert got.dtype == of_torch.dtype and exact.dtype == torch.float64
    assert got.shape == of_torch.shape == exact.shape
    size = exact.norm()
    error, error_of_torch = ((y.double() - exact).norm() / size for y in (got, of_torch))
    free = 10 * 2**-24 if got.dtype == torch.float32 and got.is_cuda else 1e-7
    message = f"relative error {error:.2e}, torch has {error_of_torch:.2e}"
    assert error <= 2 * error_of_torch + free, message


def gemm(
    rotated: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The plain kernel that multiplies with a packed weight."""
    y = rotated.new_empty(len(rotated), len(weight.row_norms))
    launch.gemm(rotated, TiledWeight.of(weight), bias, y)
    return y


def linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The op ``qamw::linear``."""
    return tiled_linear(x, TiledWeight.of(weight), bias)
