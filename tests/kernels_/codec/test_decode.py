"""Decoding: what the three tensors stand for, and the reference of a linear layer."""

import pytest
import torch

from qamw_kernels.codec.decode import (
    decode_checked,
    decode_coordinates,
    decode_weight,
    linear_reference,
)
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.codec.rotation import hadamard
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import CODES, INDEX_BITS, PLAIN, TRELLIS, load_codebook
from qamw_kernels.format.packing import pack_planes, unpack_planes
from qamw_kernels.format.weight import QuantizedWeight, largest_row_norm
from tests.helpers.weights import NMSE_CEILING, random_weight


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_encode_decode_error(index_bits: int, code: str) -> None:
    """An uneven weight: rotated it is nearly Gaussian, and its error nearly the codebook's."""
    weight = torch.randn(64, 512) * torch.rand(64, 1) * (torch.rand(512) + 0.5)
    scales = make_input_scales(512)
    decoded = decode_weight(encode_weight(weight, index_bits, 128, scales, code=code))
    nmse = float((decoded - weight).square().sum() / weight.square().sum())
    assert nmse <= (0.8 if code == TRELLIS else 1.05) * NMSE_CEILING[index_bits]


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_coordinates_are_the_codewords(index_bits: int) -> None:
    weight = random_weight(100, 192, index_bits)
    expected = load_codebook(index_bits)[unpack_planes(weight.qweight).int()].flatten(1)
    assert torch.equal(decode_coordinates(weight), expected)
    blocks = expected.double().view(-1, 64) @ hadamard(64).double() / 64**0.5
    decoded = blocks.view(100, 192) * weight.row_norms.double()[:, None]
    decoded = decoded * weight.input_scales.double()
    torch.testing.assert_close(decode_weight(weight).double(), decoded, rtol=1e-5, atol=1e-6)


def test_linear_reference_is_the_decoded_weight() -> None:
    weight, x, bias = torch.randn(33, 192), torch.randn(2, 5, 192), torch.randn(33)
    quantized = encode_weight(weight, 11, 64, make_input_scales(192, torch.rand(192) + 0.5))
    expected = x @ decode_weight(quantized).T + bias
    found = linear_reference(x, quantized, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_rotation_block_per_row() -> None:
    weight = torch.randn(5, 128)
    quantized = encode_weight(weight, 11, 128, make_input_scales(128))
    assert float((decode_weight(quantized) - weight).square().mean()) < 0.002


def test_zero_rows_decode_to_exact_zeros() -> None:
    weight = torch.randn(4, 128)
    weight[2] = 0
    quantized = encode_weight(weight, 11, 64, make_input_scales(128))
    assert quantized.row_norms[2] == 0 and (decode_weight(quantized)[2] == 0).all()
    assert quantized.qweight.shape == (11, 4, 2)


def test_extreme_magnitudes_survive() -> None:
    weight = (torch.randn(3, 128) * torch.tensor([[1e-30], [1.0], [3e36]])).bfloat16()
    decoded = decode_weight(encode_weight(weight, 11, 64, make_input_scales(128)))
    error = (decoded.double() - weight.double()).square().sum(1)
    assert max((error / weight.double().square().sum(1)).tolist()) < 0.003


def test_one_row_layer() -> None:
    weight = torch.randn(1, 64)
    assert decode_weight(encode_weight(weight, 12, 64, make_input_scales(64))).shape == (1, 64)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("rotation_block_size", [16, 512])
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_the_largest_row_norm_is_exact(
    index_bits: int, rotation_block_size: int, scale: float
) -> None:
    """The worst indices of all decode to finite values at it, and to an infinite one above it."""
    worst = load_codebook(index_bits).sum(1).argmax()  # the first weight of a block adds all up
    scales = torch.full((512,), scale).half()
    most = largest_row_norm(index_bits, PLAIN, rotation_block_size, scales)
    norms = torch.tensor([most, 1.001 * most])
    weight = QuantizedWeight(
        pack_planes(worst.expand(2, 256), index_bits), norms, scales, rotation_block_size, PLAIN
    )
    assert decode_weight(weight).isfinite().all(1).tolist() == [True, False]
    weight.rows(slice(0, 1)).check("up")
    with pytest.raises(TensorError, match=r"up\.row_norms: float32 cannot hold what row 1"):
        decode_checked(weight, "up", torch.float32)


def test_a_weight_that_a_dtype_does_not_hold_is_named() -> None:
    weight = random_weight(20, 192, 9)
    weight.row_norms[7] = 1e6
    assert decode_checked(weight, "up", torch.bfloat16).dtype == torch.bfloat16
    message = r"up\.weight\[7, \d+\] decodes to -?\d+\.\d+, too large for torch\.float16"
    with pytest.raises(TensorError, match=message):
        decode_checked(weight, "up", torch.float16)
