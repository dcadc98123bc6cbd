"""Scalar and polar coding of Gaussian coordinates."""

import pytest
import torch

from benchmarks.study.gaussian import (
    best_amplitude_bits,
    code_polar,
    code_scalar,
    polar_nmse,
    scalar_table,
)


def test_scalar_tables() -> None:
    """Errors that a direct minimization over the points finds too.

    Max's 0.009497 and 0.002499 of 1960 are rounded from fewer digits.
    """
    errors = [scalar_table(bits)[1] for bits in (3, 4, 5, 6)]
    assert errors == pytest.approx([0.03454776, 0.009501008, 0.002504668, 0.0006442397], rel=1e-6)
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(5))
    assert float((code_scalar(x, 4) - x).square().mean()) == pytest.approx(errors[1], rel=0.02)
    points = scalar_table(4)[0].half().float()
    assert torch.equal(code_scalar(x[:1000], 4), points[(x[:1000, None] - points).abs().argmin(1)])


@pytest.mark.parametrize("index_bits", [6, 8, 11])
def test_polar(index_bits: int) -> None:
    pairs = torch.randn(1 << 19, 2, generator=torch.Generator().manual_seed(6))
    coded = code_polar(pairs.view(-1, 64), index_bits).view(-1, 2)
    radius, error = coded.norm(dim=1), float((coded - pairs).square().mean())
    expected = polar_nmse(index_bits, best_amplitude_bits(index_bits))
    assert error == pytest.approx(expected, rel=0.02)
    assert len(torch.unique((coded * 1e4).round(), dim=0)) == 2**index_bits
    # Cells by their decoded radius: no other length would be nearer in the mean.
    for part in (radius < 1.2, radius >= 1.2):
        coded_part = coded[part]
        length = float((coded_part * pairs[part]).sum() / coded_part.square().sum())
        assert length == pytest.approx(1, abs=2e-3)


def test_best_polar_split() -> None:
    assert [best_amplitude_bits(bits) for bits in range(6, 13)] == [2, 3, 3, 4, 4, 5, 5]
