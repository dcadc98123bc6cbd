"""Rates: nominal and effective bits per weight, and what is refused."""

import math

import pytest
import torch

from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.errors import FormatError
from qamw_kernels.format.codebook import INDEX_BITS, PLAIN, TRELLIS, codebook_bytes, load_entries
from qamw_kernels.format.config import layer_tensors
from qamw_kernels.format.rates import (
    MAX_BITS_PER_WEIGHT,
    MIN_BITS_PER_WEIGHT,
    QuantizedShape,
    effective_bits_per_weight,
    index_bits_of_rate,
    index_bits_within,
    is_nominal,
    nominal_bits_per_weight,
    stored_bytes,
)

SHAPES = [
    QuantizedShape(4096, 11008, 11),
    QuantizedShape(22016, 4096, 11),
    QuantizedShape(576, 192, 8),
    QuantizedShape(1, 64, 6),
]


def test_the_range() -> None:
    assert (MIN_BITS_PER_WEIGHT, MAX_BITS_PER_WEIGHT) == (3.0, 6.0)
    assert [nominal_bits_per_weight(bits) for bits in INDEX_BITS] == [3, 3.5, 4, 4.5, 5, 5.5, 6]
    assert nominal_bits_per_weight(8.4) == 4.2  # a mean over layers of several rates


def test_multiples_of_half_a_bit_are_nominal() -> None:
    assert all(is_nominal(nominal_bits_per_weight(bits)) for bits in INDEX_BITS)
    assert not any(is_nominal(bpw) for bpw in (3.1, 4.25, 5.4999999, 5.75))


def test_index_bits_that_a_rate_pays_for() -> None:
    for bits in INDEX_BITS:
        assert index_bits_within(nominal_bits_per_weight(bits)) == bits
    assert [index_bits_within(bpw) for bpw in (3.4999, 3.75, 4.2, 5.9)] == [6, 7, 8, 11]


@pytest.mark.parametrize("bpw", [2.999, 0.0, -4.0, 6.001, 7.0, math.inf, -math.inf, math.nan])
def test_rates_out_of_range_are_refused(bpw: float) -> None:
    with pytest.raises(FormatError, match=f"expected 3 to 6, got {bpw:g}"):
        index_bits_within(bpw)


def test_a_rate_of_one_codebook() -> None:
    assert [index_bits_of_rate(bits / 2) for bits in INDEX_BITS] == list(INDEX_BITS)
    assert [index_bits_of_rate(rate) for rate in (3, 4, 5, 6)] == [6, 8, 10, 12]  # JSON integers


@pytest.mark.parametrize("rate", [2.5, 6.5, 4.2, "5.5", None, True, math.nan, math.inf, [5.5]])
def test_a_rate_that_no_codebook_has_is_refused(rate: object) -> None:
    with pytest.raises(FormatError) as refused:
        index_bits_of_rate(rate)
    assert repr(rate) in str(refused.value)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_tensors(shape: QuantizedShape) -> None:
    tensors = layer_tensors(shape.num_rows, shape.num_inputs, shape.index_bits).values()
    total = sum(math.prod(size) * dtype.itemsize for size, dtype in tensors)
    assert shape.num_bytes == total
    assert stored_bytes(shape.num_rows, shape.num_inputs, shape.index_bits) == total
    assert shape.num_weights == shape.num_rows * shape.num_inputs


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_bytes_are_those_that_the_encoder_makes(index_bits: int) -> None:
    weight = torch.randn(20, 192, generator=torch.Generator().manual_seed(0))
    tensors = encode_weight(weight, index_bits, 64, make_input_scales(192)).tensors()
    assert stored_bytes(20, 192, index_bits) == sum(tensor.nbytes for tensor in tensors.values())


def test_effective_bits_count_every_tensor_and_each_codebook_once() -> None:
    stored = sum(shape.num_bytes for shape in SHAPES)
    codebooks = sum(2 * load_entries(bits, PLAIN).numel() for bits in (6, 8, 11))  # bfloat16
    used = [(11, PLAIN), (8, PLAIN), (6, PLAIN), (11, PLAIN)]
    assert codebooks == codebook_bytes(used)
    assert codebook_bytes([*used, (8, TRELLIS)]) == codebooks + 2 * 2 * 128
    weights = sum(shape.num_weights for shape in SHAPES)
    assert effective_bits_per_weight(SHAPES) == 8 * (stored + codebooks) / weights
    assert effective_bits_per_weight(iter(SHAPES)) == effective_bits_per_weight(SHAPES)


def test_effective_bits_of_a_large_layer_are_close_to_nominal() -> None:
    """Llama-2-7B's down_proj at 5.5 bpw: 32 / K of norms, 16 / N of scales, and one codebook."""
    shape = QuantizedShape(4096, 11008, 11)
    codebook = 8 * codebook_bytes([(11, PLAIN)]) / shape.num_weights
    expected = 5.5 + 32 / 11008 + 16 / 4096 + codebook
    assert effective_bits_per_weight([shape]) == pytest.approx(expected, rel=1e-12)
    assert shape.stored_bits_per_weight == pytest.approx(expected - codebook, rel=1e-12)
