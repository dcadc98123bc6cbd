"""Products with packed weights whose exact value is known."""

from typing import NamedTuple

import torch

from qamw_kernels.codec.decode import decode_indices
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.ops.tiling import tile_planes
from qamw_kernels.ops.weight import Rate, TiledWeight, entry_words


class Product(NamedTuple):
    """What is multiplied, and the exact result.

    Attributes:
        weight: [N, K], without input scales.
        x: activations [M, K], as they are multiplied.
        bias: [N] or None.
        exact: [M, N] float64.
    """

    weight: TiledWeight
    x: torch.Tensor
    bias: torch.Tensor | None
    exact: torch.Tensor


def random_product(
    num_tokens: int,
    num_rows: int,
    num_inputs: int,
    rate: Rate,
    dtype: torch.dtype,
    has_bias: bool,
) -> Product:
    """A random product, the same one for the same arguments; every index is used equally often."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_rows * num_inputs // 2, generator=generator)
    indices = (order % 2**rate.index_bits).view(num_rows, -1)
    x = torch.randn(num_tokens, num_inputs, generator=generator).to(dtype)
    row_norms = torch.rand(num_rows, generator=generator) + 0.5
    bias = torch.randn(num_rows, generator=generator).to(dtype) if has_bias else None
    coordinates = decode_indices(indices.short(), *rate).double()
    exact = x.double() @ coordinates.T * row_norms.double()
    exact = exact if bias is None else exact + bias.double()
    weight = TiledWeight(
        tile_planes(pack_planes(indices, rate.index_bits), rate.code),
        row_norms,
        torch.ones(num_inputs).half(),
        entry_words(*rate),
        64,
    )
    return Product(weight, x, bias, exact)


def check_rounded(y: torch.Tensor, exact: torch.Tensor) -> None:
    """Check that y is the exact result, rounded to its dtype, but for the order of additions."""
    step = 2**-8 if y.dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(y.double(), exact, rtol=step, atol=1e-3)
    # One wrong weight spoils its row of y.T, which is 1 % of y or more with up to 100 rows.
    assert (y == exact.to(y.dtype)).double().mean() > 0.99
