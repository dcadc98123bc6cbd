"""Error feedback, against its reference."""

import pytest
import torch

from offline_quantize.encoding.feedback import (
    DAMPING,
    encode_with_feedback,
    encode_with_feedback_reference,
    factor,
    feedback_matrix,
    shrink,
)
from qamw_kernels.codec.nearest import nearest
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import load_codebook
from tests.helpers.hessians import correlated_hessian, output_error


@pytest.mark.parametrize("index_bits", [6, 11])
@pytest.mark.parametrize("num_inputs", [64, 320])  # within one lazy block, and over three
def test_feedback_is_regression_on_what_is_left(num_inputs: int, index_bits: int) -> None:
    hessian = correlated_hessian(num_inputs, 2000)
    coordinates = torch.randn(24, num_inputs, generator=torch.Generator().manual_seed(1))
    root = factor(hessian, 0.0)
    torch.testing.assert_close(root @ root.T, hessian)
    fast = encode_with_feedback(coordinates, feedback_matrix(root), index_bits)
    slow = encode_with_feedback_reference(coordinates.double(), hessian, index_bits)
    assert fast.shape == slow.shape == (24, num_inputs // 2) and fast.dtype == torch.int16
    # Rounding may change one choice, and with it those after it: rows must be equal, or as good.
    codebook = load_codebook(index_bits)
    for row in range(len(coordinates)):
        if not torch.equal(fast[row], slow[row]):
            errors = [
                output_error(coordinates[row] - codebook[indices[row].int()].flatten(), hessian)
                for indices in (fast, slow)
            ]
            assert errors[0] == pytest.approx(errors[1], rel=0.25)
    assert (fast == slow).all(1).float().mean() >= 0.75


def test_correlations_shown_by_few_tokens_count_less() -> None:
    """As for an expert that is seldom chosen: the error under all tokens' Hessian is smaller."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 320, generator=generator, dtype=torch.float64)
    mixing = torch.randn(320, 320, generator=generator, dtype=torch.float64) / 320**0.5
    inputs = inputs @ (mixing + 0.3 * torch.eye(320))
    coordinates, codebook = torch.randn(48, 320, generator=generator), load_codebook(8)

    def error(hessian: torch.Tensor) -> float:
        indices = encode_with_feedback(coordinates, feedback_matrix(factor(hessian, DAMPING)), 8)
        difference = coordinates - codebook[indices.int()].view(48, 320)
        return output_error(difference, inputs.T @ inputs / len(inputs))

    few = inputs[:80].T @ inputs[:80] / 80
    shrunk = shrink(few.clone(), 80)
    assert torch.equal(shrunk.diagonal(), few.diagonal())
    torch.testing.assert_close(shrunk.triu(1), few.triu(1) / 5)
    assert error(shrunk) < 0.9 * error(few)


def test_feedback_without_correlations_is_nearest() -> None:
    coordinates = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    diagonal = torch.diag(torch.rand(128, dtype=torch.float64) + 0.1)
    feedback = feedback_matrix(factor(diagonal, 0.01))
    assert not feedback.any()
    indices = encode_with_feedback(coordinates, feedback, 9)
    assert torch.equal(indices.flatten(), nearest(coordinates.view(-1, 2), 9))


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(TensorError, match="not finite"):
        factor(torch.full((4, 4), torch.inf, dtype=torch.float64), 0.1)
