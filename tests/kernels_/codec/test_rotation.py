"""The rotation is the Hadamard matrix, does not depend on batching, and leaves its input alone."""

import math

import pytest
import torch

from qamw_kernels.codec.rotation import hadamard, rotate, unrotate
from qamw_kernels.format.config import ROTATION_BLOCK_SIZES


@pytest.mark.parametrize("size", ROTATION_BLOCK_SIZES)
def test_rotation_is_the_hadamard_matrix(size: int) -> None:
    x = torch.randn(5, 3 * size, dtype=torch.float64)
    expected = (x.view(-1, size) @ hadamard(size).double() / math.sqrt(size)).view_as(x)
    torch.testing.assert_close(rotate(x, size), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(unrotate(rotate(x, size), size), x, rtol=0, atol=1e-13)


def test_rotation_does_not_depend_on_batching() -> None:
    x = torch.randn(9, 256)
    assert torch.equal(rotate(x, 64)[3:4], rotate(x[3:4], 64))


def test_the_result_is_contiguous_and_the_input_left_alone() -> None:
    weight, x = torch.randn(5, 128), torch.randn(1, 64)
    before = x.clone()
    assert rotate(weight, 128).is_contiguous()
    rotate(x, 64)
    assert torch.equal(x, before)
