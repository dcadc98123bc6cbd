"""Products with packed weights whose exact value is known."""

from typing import NamedTuple

import torch

from qamw_kernels.format.codebook import load_codebook


class Product(NamedTuple):
    """What is multiplied, and the exact result.

    Attributes:
        indices: of codewords [N, K / 2].
        x: activations [M, K], as they are multiplied.
        row_norms: [N] float32.
        bias: [N] or None.
        exact: [M, N] float64.
    """

    indices: torch.Tensor
    x: torch.Tensor
    row_norms: torch.Tensor
    bias: torch.Tensor | None
    exact: torch.Tensor


def random_product(
    num_tokens: int,
    num_rows: int,
    num_inputs: int,
    index_bits: int,
    dtype: torch.dtype,
    has_bias: bool,
) -> Product:
    """The same for the same arguments; codewords are used equally often."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_rows * num_inputs // 2, generator=generator)
    indices = (order % 2**index_bits).view(num_rows, -1)
    x = torch.randn(num_tokens, num_inputs, generator=generator).to(dtype)
    row_norms = torch.rand(num_rows, generator=generator) + 0.5
    bias = torch.randn(num_rows, generator=generator).to(dtype) if has_bias else None
    coordinates = load_codebook(index_bits)[indices].flatten(1).double()
    exact = x.double() @ coordinates.T * row_norms.double()
    exact = exact if bias is None else exact + bias.double()
    return Product(indices, x, row_norms, bias, exact)


def check_rounded(y: torch.Tensor, exact: torch.Tensor) -> None:
    """y is the exact result, rounded to its dtype, but for the order of additions."""
    step = 2**-8 if y.dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(y.double(), exact, rtol=step, atol=1e-3)
    # One wrong weight spoils a row, which is one in a hundred at least.
    assert (y == exact.to(y.dtype)).double().mean() > 0.99
