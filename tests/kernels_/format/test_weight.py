"""The three tensors of a layer: what they describe together, and which values are refused."""

import math

import pytest
import torch

from qamw_kernels.errors import TensorError
from qamw_kernels.format.config import LAYER_TENSORS, layer_tensors
from qamw_kernels.format.weight import (
    check_finite,
    check_input_scales,
    check_plain,
    check_row_norms,
)
from tests.helpers.weights import random_weight


def test_tensors_are_those_of_the_format() -> None:
    weight = random_weight(20, 192, 9)
    assert (weight.shape, weight.index_bits) == ((20, 192), 9)
    assert tuple(weight.tensors()) == LAYER_TENSORS
    found = {name: (tuple(t.shape), t.dtype) for name, t in weight.tensors().items()}
    assert found == layer_tensors(20, 192, 9)


def test_rows_are_a_weight_of_their_own() -> None:
    weight = random_weight(20, 192, 9)
    part = weight.rows(slice(3, 7))
    assert (part.shape, part.index_bits, part.rotation_block_size) == ((4, 192), 9, 64)
    assert torch.equal(part.qweight, weight.qweight[:, 3:7])
    assert torch.equal(part.row_norms, weight.row_norms[3:7])
    assert torch.equal(part.input_scales, weight.input_scales)


@pytest.mark.parametrize("bad", [0.0, -0.0, 1e-5, math.nan, math.inf, -math.inf])
def test_input_scales_that_are_not_normal_are_refused(bad: float) -> None:
    scales = torch.tensor([1.0, -2.0, 6.2e-5]).half()
    check_input_scales(scales)
    scales[1] = bad
    with pytest.raises(TensorError, match=r"input_scales\[1\] = .*finite, normal float16"):
        check_input_scales(scales)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_row_norms_that_are_negative_or_not_finite_are_refused(bad: float) -> None:
    norms = torch.tensor([0.0, 1.0, 3e38])
    check_row_norms(norms)
    norms[2] = bad
    with pytest.raises(TensorError, match=r"row_norms: expected finite.*not negative.*row 2"):
        check_row_norms(norms)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    tensor = torch.ones(2, 3, 4)
    check_finite(tensor, "experts")
    tensor[1, 2, 0] = bad
    with pytest.raises(TensorError, match=r"experts\[1, 2, 0\] is -?(nan|inf)"):
        check_finite(tensor, "experts")


@pytest.mark.parametrize("name", ["norm.weight", "q_proj.bias"])
def test_plain_weights_are_of_floating_point_and_finite(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        check_plain(torch.ones(3).to(dtype), name)
    check_plain(torch.ones(3, dtype=torch.int64), "rotary.position_ids")
    check_plain(torch.ones(1, 1, 8, 8, dtype=torch.bool), "attn.bias")
    with pytest.raises(TensorError, match=rf"{name} is torch\.int8, expected floating point"):
        check_plain(torch.ones(3, dtype=torch.int8), name)
    with pytest.raises(TensorError, match=rf"{name}\[1\] is nan"):
        check_plain(torch.tensor([1, math.nan]), name)


@pytest.mark.parametrize(
    ("suffix", "bad", "message"),
    [
        ("row_norms", -1.0, r"up\.row_norms: expected finite.* got -1\.0 in row 3"),
        ("row_norms", math.nan, r"up\.row_norms: expected finite.* got nan in row 3"),
        ("row_norms", 3e38, r"up\.row_norms: float32 cannot hold what row 3 can decode to"),
        ("input_scales", 0.0, r"up\.input_scales\[3\] = 0\.0: expected a finite, normal"),
    ],
)
def test_a_weight_with_an_impossible_value_is_refused(
    suffix: str, bad: float, message: str
) -> None:
    weight = random_weight(20, 192, 9)
    weight.check("up")
    weight.tensors()[suffix][3] = bad
    with pytest.raises(TensorError, match=message):
        weight.check("up")
