"""The encoding of input groups."""

import itertools
from dataclasses import replace

import pytest
import torch

from offline_quantize.encoding.group import (
    CODERS,
    ENCODERS,
    EncodedGroup,
    Errors,
    encode_group,
    fit_row_norms,
    measure,
)
from offline_quantize.ranks import ALONE, Ranks
from qamw_kernels.codec.encode import make_input_scales
from qamw_kernels.format.codebook import CODES, PLAIN, TRELLIS
from tests.helpers.hessians import correlated_hessian
from tests.helpers.ranks import in_ranks


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("index_bits", [7, 11])
def test_feedback_lowers_the_output_error(index_bits: int, code: str) -> None:
    hessian = correlated_hessian(256, 8000)
    generator = torch.Generator().manual_seed(3)
    weights = {"a": torch.randn(64, 256, generator=generator), "b": torch.randn(32, 256)}
    hessians = dict.fromkeys(weights, hessian.float())
    beam, feedback, nearest = (
        encode_group(weights, index_bits, 128, hessians, encoder, code=code).errors
        for encoder in ("beam", "feedback", "nearest")
    )
    for name in weights:
        assert feedback[name].output_nmse < 0.6 * nearest[name].output_nmse
        assert beam[name].output_nmse < 0.97 * feedback[name].output_nmse


def test_row_norms_are_fitted() -> None:
    hessian = correlated_hessian(128, 500).float()
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(6))
    weight[3] = 0
    encoded = encode_group({"w": weight}, 8, 64, {"w": hessian}, "feedback").quantized["w"]
    wrong = replace(encoded, row_norms=encoded.row_norms * 1.05)
    fitted = fit_row_norms(weight, wrong, hessian)
    errors = [measure(weight, x, hessian).output_nmse for x in (fitted, encoded, wrong)]
    assert errors == sorted(errors) and errors[0] < errors[1]
    assert fitted.row_norms[3] == 0
    far = replace(encoded, row_norms=encoded.row_norms * 2)
    assert torch.equal(fit_row_norms(weight, far, hessian).row_norms, far.row_norms * 0.9)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("encoder", CODERS)
@pytest.mark.parametrize("kind", ["dead channels", "rank one", "few tokens", "tiny", "huge"])
def test_any_hessian_is_safe(kind: str, encoder: str, code: str) -> None:
    hessian = correlated_hessian(128, 40 if kind == "few tokens" else 500).float()
    if kind == "dead channels":
        hessian[:, ::3] = 0
        hessian[::3] = 0
    elif kind == "rank one":
        hessian = torch.outer(hessian[0], hessian[0])
    elif kind in ("tiny", "huge"):
        hessian *= 1e-30 if kind == "tiny" else 1e30
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(4))
    weight[3] = 0
    weight[:, 5] = 0
    encoded = encode_group({"w": weight}, 10, 64, {"w": hessian}, encoder, code=code)
    nearest = encode_group({"w": weight}, 10, 64, {"w": None}, "nearest", code=code)
    assert encoded.quantized["w"].code == code
    assert encoded.quantized["w"].row_norms[3] == 0
    assert 0 < encoded.errors["w"].output_nmse < 0.01
    assert encoded.errors["w"].nmse < 30 * nearest.errors["w"].nmse


def test_channel_scales_are_left_out_where_nothing_is_to_be_balanced() -> None:
    weights = {"w": torch.randn(32, 128, generator=torch.Generator().manual_seed(5))}
    weights["w"][:, ::7] *= 10
    hessians = {"w": correlated_hessian(128, 500).float()}
    balanced = encode_group(weights, 8, 64, hessians, "feedback").quantized["w"]
    plain = encode_group(weights, 8, 64, hessians, "feedback", balance=False).quantized["w"]
    signs = make_input_scales(128)
    assert torch.equal(plain.input_scales, signs)
    assert torch.equal(balanced.input_scales.sign(), signs)
    assert not torch.equal(balanced.input_scales, signs)
    without = encode_group(weights, 8, 64, {"w": None}, "feedback")
    assert torch.equal(without.quantized["w"].input_scales, signs)
    assert without.errors["w"].output_nmse is None


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("encoder", "code"), [*itertools.product(ENCODERS, [PLAIN]), ("beam", TRELLIS)]
)
def test_processes_share_the_rows(encoder: str, code: str, count: int) -> None:
    """Some weights are cut, some have Hessians of their own, as experts have, or none."""
    generator = torch.Generator().manual_seed(8)
    sizes = {"a": 33, "b": 64, "c": 20, "d": 7}
    weights = {name: torch.randn(n, 128, generator=generator) for name, n in sizes.items()}
    shared, own = (correlated_hessian(128, 500).float() for _ in range(2))
    hessians = {"a": shared, "b": shared, "c": None, "d": own}

    def encode(ranks: Ranks) -> EncodedGroup:
        return encode_group(weights, 9, 64, hessians, encoder, ranks=ranks, code=code)

    alone = encode(ALONE)
    for group in in_ranks(count, encode):
        assert group.quantized.keys() == weights.keys()
        for name, weight in weights.items():
            quantized, expected = group.quantized[name], alone.quantized[name]
            assert torch.equal(quantized.input_scales, expected.input_scales)
            # Matrix products of other shapes may round otherwise.
            torch.testing.assert_close(quantized.row_norms, expected.row_norms)
            assert_alike(group.errors[name], alone.errors[name])
            assert_alike(measure(weight, quantized, hessians[name]), alone.errors[name])


def assert_alike(errors: Errors, expected: Errors) -> None:
    assert errors.nmse == pytest.approx(expected.nmse, rel=0.05)
    if expected.output_nmse is None:
        assert errors.output_nmse is None
    else:
        assert errors.output_nmse == pytest.approx(expected.output_nmse, rel=0.05)
