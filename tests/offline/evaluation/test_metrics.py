"""Standard errors."""

import math

import pytest
import torch

from offline_quantize.evaluation.metrics import clustered_mean


def test_standard_errors_are_clustered_by_window() -> None:
    sums = torch.tensor([10.0, 30.0, 20.0], dtype=torch.float64)
    units = torch.full((3,), 10.0, dtype=torch.float64)
    mean, error = clustered_mean(sums, units)
    assert mean == 2
    textbook = float((sums / units).std() / math.sqrt(3))  # for equal windows
    assert error == pytest.approx(textbook)
    assert clustered_mean(sums[:1], units[:1]) == (1, None)
