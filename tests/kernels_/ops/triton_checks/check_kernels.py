"""Each kernel alone: decoding is exact, the others lose what torch loses."""

import math

import pytest
import torch
import triton
import triton.language as tl

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.rotation import hadamard
from qamw_kernels.format.codebook import INDEX_BITS, TRELLIS
from qamw_kernels.format.config import ROTATION_BLOCK_SIZES
from qamw_kernels.format.packing import pack_planes, unpack_planes
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.triton.arithmetic import cast, dot
from qamw_kernels.ops.triton.rotate_launch import MANY_INPUTS, rotate, rotate_many
from qamw_kernels.ops.weight import Rate, TiledWeight
from tests.kernels_.ops.triton_checks.common import (
    DEVICE,
    DTYPES,
    NUM_ROWS,
    assert_as_good_as_torch,
    coordinates,
    gemm,
    random,
    random_weight,
)

RATES = [*map(Rate, INDEX_BITS), *(Rate(b, TRELLIS) for b in (6, 11, 12))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_decoding_is_exact(rate: Rate, dtype: torch.dtype) -> None:
    # 9,600 pairs: every index occurs; a tile and a part of one.
    index_bits, code = rate
    weight = random_weight(30, 10 * 64, index_bits, code=code)
    weight.row_norms.fill_(1)
    assert len(unpack_planes(weight.qweight).unique()) == 2**index_bits
    inputs = torch.eye(10 * 64, dtype=dtype, device=DEVICE)
    assert torch.equal(gemm(inputs, weight).float(), coordinates(weight).T)


@triton.jit
def cast_and_dot_kernel(p_x, p_cast, p_square, DTYPE: tl.constexpr):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = cast(tl.load(p_x + o), DTYPE)
    tl.store(p_cast + o, x)
    tl.store(p_square + o, dot(x, x, tl.zeros([16, 16], dtype=tl.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_rounds_to_nearest_and_dot_multiplies_numbers(dtype: torch.dtype) -> None:
    x = random(16, 16)
    x[0] = 1 + torch.arange(16) * 2**-11  # ties and near-ties of bfloat16 and float16
    x[1] = -2 + torch.arange(16) * 2**-12  # and a carry into the exponent
    narrow, square = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    cast_and_dot_kernel[1,](x, narrow, square, DTYPE=launch.TL_DTYPES[dtype])
    assert torch.equal(narrow, x.to(dtype))
    expected = narrow.double() @ narrow.double()
    torch.testing.assert_close(square.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation_block_size", ROTATION_BLOCK_SIZES)
def test_rotate(rotation_block_size: int, dtype: torch.dtype) -> None:
    num_inputs = 3 * max(64, rotation_block_size)
    input_scales = random_weight(1, num_inputs, 6).input_scales
    signs = hadamard(rotation_block_size).to(DEVICE)
    root = math.sqrt(rotation_block_size)
    for num_tokens in (1, 3, 17):
        x = random(num_tokens, num_inputs, dtype=dtype)
        got = rotate(x, input_scales, rotation_block_size)
        blocks = (x.double() * input_scales.double()).view(-1, rotation_block_size)
        exact = blocks @ (signs.double() / root)
        scaled = (x.float() * input_scales.float()).to(dtype).view(-1, rotation_block_size)
        of_torch = scaled @ signs.to(dtype) / root
        assert_as_good_as_torch(got, of_torch.view_as(x), exact.view_as(x))


def swapped(num_inputs: int) -> torch.Tensor:
    """Bits 1 and 2 of an input's number change places with bits 3 and 4."""
    inputs = torch.arange(num_inputs, device=DEVICE)
    return inputs & ~0b11110 | (inputs & 0b110) << 2 | (inputs & 0b11000) >> 2


@pytest.mark.parametrize(
    "rotation_block_size, num_tokens", [(16, 3), (64, 3), (64, MANY_INPUTS // 192 + 1)]
)
def test_rotate_swaps_inputs(rotation_block_size: int, num_tokens: int) -> None:
    x, input_scales = random(num_tokens, 192), random_weight(1, 192, 6).input_scales
    plain = rotate(x, input_scales, rotation_block_size)
    found = rotate(x, input_scales, rotation_block_size, swapped=True)
    # Programs have more rows than those that do not swap, and may add up in another order.
    torch.testing.assert_close(found, plain[:, swapped(192)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation_block_size", ROTATION_BLOCK_SIZES)
@pytest.mark.parametrize("spans", [1, 3])
def test_rotate_many(rotation_block_size: int, dtype: torch.dtype, spans: int) -> None:
    """With one span, several programs share out the tokens."""
    num_inputs = spans * max(64, rotation_block_size)
    input_scales = random_weight(1, num_inputs, 6).input_scales
    x = random(133, num_inputs, dtype=dtype)
    got = torch.empty_like(x)
    rotate_many(x, input_scales, rotation_block_size, got)
    blocks = (x.double() * input_scales.double()).view(-1, rotation_block_size)
    signs, root = hadamard(rotation_block_size).to(DEVICE), math.sqrt(rotation_block_size)
    exact = (blocks @ (signs.double() / root)).view_as(x)
    scaled = (x.float() * input_scales.float()).to(dtype).view(-1, rotation_block_size)
    of_torch = (scaled @ signs.to(dtype) / root).view_as(x)
    order = swapped(num_inputs)
    assert_as_good_as_torch(got, of_torch[:, order], exact[:, order])


@pytest.mark.parametrize("num_tokens", [1, MANY_INPUTS // 128 + 1])
def test_rotate_overflows_only_where_the_result_does(num_tokens: int) -> None:
    x = torch.zeros(num_tokens, 128, dtype=torch.float16, device=DEVICE)
    x[0, 5] = 60000
    # 240,000 is no float16.
    input_scales = torch.full((128,), -4, dtype=torch.float16, device=DEVICE)
    got = rotate(x, input_scales, 128, swapped=num_tokens > 1)[:1]
    x = x[:1]
    assert torch.equal(got.abs(), torch.full_like(x, 240000 / math.sqrt(128)))


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", [*map(Rate, INDEX_BITS), Rate(11, TRELLIS)], ids=str)
def test_gemm(rate: Rate, dtype: torch.dtype, num_tokens: int) -> None:
    """1, 3 and 16 tokens take the skinny tile, more the wide one."""
    index_bits, code = rate
    weight = random_weight(NUM_ROWS, 5 * 64, index_bits, code=code)
    rotated = random(num_tokens, 5 * 64, dtype=dtype)
    bias = random(NUM_ROWS, dtype=dtype, seed=2) if num_tokens != 3 else None
    got = gemm(rotated, weight, bias)
    plain = coordinates(weight)
    exact = rotated.double() @ plain.double().T * weight.row_norms.double()
    of_torch = (rotated @ plain.to(dtype).T).float() * weight.row_norms
    if bias is not None:
        exact, of_torch = exact + bias.double(), of_torch + bias.float()
    assert_as_good_as_torch(got, of_torch.to(dtype), exact)


def test_gemm_tolerance_sees_one_wrong_weight() -> None:
    weight = random_weight(NUM_ROWS, 5 * 64, 11)
    rotated = random(33, 5 * 64, dtype=torch.bfloat16)
    exact = rotated.double() @ coordinates(weight).double().T * weight.row_norms.double()
    product = (rotated @ coordinates(weight).bfloat16().T).float()
    of_torch = (product * weight.row_norms).bfloat16()
    indices = unpack_planes(weight.qweight)
    indices[weight.row_norms.argmax(), 17] ^= 1 << 10  # the sign of one y
    weight.qweight = pack_planes(indices, 11)
    got = gemm(rotated, weight)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_good_as_torch(got, of_torch, exact)


@pytest.mark.parametrize("num_rows, num_units", [(1, 1), (129, 2), (64, 7)])
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_gemm_of_odd_sizes(num_rows: int, num_units: int, num_tokens: int) -> None:
    weight = random_weight(num_rows, 64 * num_units, 7)
    rotated = random(num_tokens, 64 * num_units)
    got = gemm(rotated, weight)
    of_torch = rotated @ coordinates(weight).T * weight.row_norms
    exact = rotated.double() @ coordinates(weight).double().T * weight.row_norms.double()
    assert_as_good_as_torch(got, of_torch, exact)


def check_dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    got = launch.dequantize(TiledWeight.of(weight), dtype)
    size = weight.rotation_block_size
    matrix = hadamard(size).to(DEVICE, torch.float64) / math.sqrt(size)
    plain = (coordinates(weight).double().view(-1, size) @ matrix).view_as(got)
    exact = plain * weight.row_norms.double()[:, None] * weight.input_scales.double()
    assert_as_good_as_torch(got, decode_weight(weight).to(dtype), exact)
    # Element by element, one step of the dtype (a little more where cancellation leaves
    # float32's error).
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=step, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_dequantize(rate: Rate, dtype: torch.dtype) -> None:
    index_bits, code = rate
    check_dequantize(random_weight(NUM_ROWS, 5 * 64, index_bits, code=code), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation_block_size", ROTATION_BLOCK_SIZES)
def test_dequantize_rotation_block_sizes(rotation_block_size: int, dtype: torch.dtype) -> None:
    num_inputs = 3 * max(64, rotation_block_size)
    check_dequantize(random_weight(NUM_ROWS, num_inputs, 11, rotation_block_size), dtype)
