"""The study's integer methods against naive computations of the same things."""

import math

import pytest
import torch
from torch import nn

from benchmarks.study.integers import (
    SmoothedLinear,
    gptq,
    grid,
    grouped_bits,
    int8_per_channel,
    round_to_nearest,
    smoothing_factors,
)


def correlated(num_inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [512, K] of unequal, correlated channels, and their Hessian [K, K]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(512, num_inputs, generator=generator)
    x = x @ torch.randn(num_inputs, num_inputs, generator=generator)
    x[:, ::7] *= 10
    return x, x.T @ x


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 6])
def test_round_to_nearest(weight: torch.Tensor, bits: int, symmetric: bool) -> None:
    rounded = round_to_nearest(weight, bits, 64, symmetric)
    stored = 0
    for start in (0, 64, 128):  # the last group has 22 inputs
        rows = weight[:, start : start + 64].tolist()
        for row, out in zip(rows, rounded[:, start : start + 64].tolist(), strict=True):
            low, high = min(0.0, *row), max(0.0, *row)
            if symmetric:
                low, high = -max(map(abs, row)), max(map(abs, row))
            step = (high - low) / (2**bits - 1)
            assert len(set(out)) <= 2**bits
            # Half a step at the ends of the grid too, whose zero and step are rounded themselves.
            largest_error = max(abs(a - b) for a, b in zip(row, out, strict=True))
            assert largest_error <= step * (0.52 + 0.01 * bits)
            stored += len(row) * bits + 16 + (0 if symmetric else bits)
    assert len(weight) * grouped_bits(150, bits, 64, symmetric) == stored


def test_int8(weight: torch.Tensor) -> None:
    codes, scales = int8_per_channel(weight)
    assert codes.abs().amax(1).tolist() == [127] * 8 and torch.equal(codes, codes.round())
    most = 0.53 * weight.abs().amax(1, keepdim=True) / 127
    assert ((codes * scales - weight).abs() <= most).all()
    assert not int8_per_channel(torch.zeros(2, 4))[0].any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_is_the_greedy_optimum_column_by_column(symmetric: bool) -> None:
    """Naive: round each input, then move all later weights to the least squared output error."""
    _, hessian = correlated(24)
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    damping = 0.01 * hessian.diagonal().double().mean()
    damped = hessian.double() + damping * torch.eye(24, dtype=torch.float64)
    rest = weight.double()
    for i in range(24):
        if i % 10 == 0:
            scales, zeros = (t.double() for t in grid(rest[:, i : i + 10].float(), 4, symmetric))
        code = ((rest[:, i : i + 1] / scales).round() + zeros).clamp(0, 15)
        value = (code - zeros) * scales
        error = rest[:, i : i + 1] - value
        rest[:, i : i + 1] = value
        if i < 23:
            later = torch.linalg.solve(damped[i + 1 :, i + 1 :], damped[i + 1 :, i])
            rest[:, i + 1 :] += error * later
    ours = gptq(weight, hessian, 4, 10, symmetric).double()
    torch.testing.assert_close(ours, rest, rtol=1e-4, atol=1e-5)


def test_gptq_has_less_output_error_than_rounding(weight: torch.Tensor) -> None:
    x, hessian = correlated(150)
    x[:, 5], hessian[5], hessian[:, 5] = 0, 0, 0  # a dead input

    def error(quantized: torch.Tensor) -> float:
        return float((x @ (quantized - weight).T).square().sum())

    quantized = gptq(weight, hessian, 4, 64, False)
    assert quantized.isfinite().all()
    assert error(quantized) < 0.7 * error(round_to_nearest(weight, 4, 64, False))


@torch.no_grad()
def test_smoothquant() -> None:
    linear = nn.Linear(48, 20)
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(4))
    x[..., 7] *= 100
    other = torch.randn(4, 48)
    factors = smoothing_factors(x.abs().amax((0, 1)), [linear.weight, other])
    for k in range(48):
        largest_weight = max(linear.weight[:, k].abs().max(), other[:, k].abs().max())
        expected = math.sqrt(x[..., k].abs().max() / largest_weight)
        assert float(factors[k]) == pytest.approx(expected, rel=1e-3)
    exact = linear(x)
    # The function is the same except for rounding, here of the scales to float16.
    fine = SmoothedLinear(linear, factors, bits=16)(x)
    assert float((fine - exact).square().mean() / exact.square().mean()) < 1e-6

    def error(smoothing: torch.Tensor) -> float:
        return float((SmoothedLinear(linear, smoothing)(x) - exact).square().mean())

    assert 0 < error(factors) < 0.3 * error(torch.ones(48))
