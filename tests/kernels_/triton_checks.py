"""The Triton kernels against plain torch. Not collected by itself: test_kernels.py runs it in a process of its own, because
Triton reads TRITON_INTERPRET when it is imported. Without that variable it needs a GPU:

    TRITON_INTERPRET=1 python -m pytest tests/kernel_checks.py
"""

import itertools
import math
import runpy
import weakref
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from qamw_kernels.ops import linear as ops
from qamw_kernels.ops.triton import launch as triton_launch
from qamw_kernels.format.codebook import INDEX_BITS, load_codebook
from qamw_kernels.codec.encode import QuantizedWeight, decode_weight, linear_reference
from qamw_kernels.format.packing import pack_planes, unpack_planes
from qamw_kernels.codec.rotation import ROTATION_BLOCK_SIZES, hadamard
from qamw_kernels.ops.routing import sort_slots
from qamw_kernels.ops.tiling import tile_planes
from qamw_kernels.ops.triton.kernels import cast, dot

DEVICE = "cpu" if ops.INTERPRETED else "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_ROWS = 100  # not a multiple of any BLOCK_N


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch):
    """torch.empty returns NaN, followed by more NaN: a test sees an element no program writes, and a write past the end."""
    empty, guards = torch.empty, []

    def nan_empty(*shape, dtype=torch.float32, device="cpu", **kwargs):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if kwargs or not dtype.is_floating_point:
            return empty(shape, dtype=dtype, device=device, **kwargs)
        size = math.prod(shape)
        buffer = empty(size + (1 << 16), dtype=dtype, device=device).fill_(math.nan)
        guards.append(buffer[size:])
        return buffer[:size].view(shape)

    monkeypatch.setattr(torch, "empty", nan_empty)
    yield
    assert all(guard.isnan().all() for guard in guards), "written past the end"


def random_weight(num_rows: int, num_inputs: int, index_bits: int, rotation_block_size: int = 64, seed: int = 0) -> QuantizedWeight:
    """Random indices that name every codeword as often as the size allows, row norms over four octaves, signed scales."""
    generator = torch.Generator().manual_seed(seed)
    num_pairs = num_rows * num_inputs // 2
    indices = (torch.randperm(num_pairs, generator=generator) % 2**index_bits).view(num_rows, -1)
    row_norms = torch.rand(num_rows, generator=generator).mul(4).sub(2).exp2()
    signs = torch.randint(0, 2, (num_inputs,), generator=generator) * 2 - 1
    input_scales = (signs * (0.5 + torch.rand(num_inputs, generator=generator))).half()
    qweight = pack_planes(indices, index_bits)
    return QuantizedWeight(qweight.to(DEVICE), row_norms.to(DEVICE), input_scales.to(DEVICE), rotation_block_size)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def coordinates(weight: QuantizedWeight) -> torch.Tensor:
    """[N, K] float32."""
    return load_codebook(weight.index_bits).to(DEVICE)[unpack_planes(weight.qweight).int()].flatten(1)


def assert_as_good_as_torch(got: torch.Tensor, of_torch: torch.Tensor, truth: torch.Tensor) -> None:
    """The error of ``got`` against the float64 truth is at most twice that of torch in the same dtype (norms), or in float32 on a GPU,
    where its library may add in another order, ten roundings more."""
    assert got.dtype == of_torch.dtype and got.shape == of_torch.shape == truth.shape and truth.dtype == torch.float64
    size = truth.norm()
    error, error_of_torch = ((y.double() - truth).norm() / size for y in (got, of_torch))
    free = 10 * 2**-24 if got.dtype == torch.float32 and got.is_cuda else 1e-7
    assert error <= 2 * error_of_torch + free, f"relative error {error:.2e}, torch has {error_of_torch:.2e}"


def tiled(weight: QuantizedWeight) -> triton_launch.TiledWeight:
    words = ops.quadrant_words(weight.index_bits, DEVICE)
    return triton_launch.TiledWeight(
        tile_planes(weight.qweight), weight.row_norms, weight.input_scales, words, weight.rotation_block_size)


def gemm(rotated: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return triton_launch.gemm(rotated, tiled(weight), bias)


def linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    parts = tiled(weight)
    return ops.linear(x, *parts[:-1], bias, parts.rotation_block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_decoding_is_exact(index_bits, dtype):
    weight = random_weight(30, 10 * 64, index_bits)  # 9,600 pairs: every codeword occurs; a tile and a part of one
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
def test_cast_rounds_to_nearest_and_dot_multiplies_numbers(dtype):
    x = random(16, 16)
    x[0] = 1 + torch.arange(16) * 2**-11  # ties and near-ties of bfloat16 and float16
    x[1] = -2 + torch.arange(16) * 2**-12  # and a carry into the exponent
    narrow, square = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    cast_and_dot_kernel[1,](x, narrow, square, DTYPE=triton_launch.TL_DTYPES[dtype])
    assert torch.equal(narrow, x.to(dtype))
    torch.testing.assert_close(square.double(), narrow.double() @ narrow.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation_block_size", ROTATION_BLOCK_SIZES)
def test_rotate(rotation_block_size, dtype):
    num_inputs = 3 * max(64, rotation_block_size)
    input_scales = random_weight(1, num_inputs, 6).input_scales
    for num_tokens in (1, 3, 17):
        x = random(num_tokens, num_inputs, dtype=dtype)
        got = triton_launch.rotate(x, input_scales, rotation_block_size)
        matrix = hadamard(rotation_block_size).to(DEVICE, torch.float64) / math.sqrt(rotation_block_size)
        truth = (x.double() * input_scales.double()).view(-1, rotation_block_size) @ matrix
        scaled = (x.float() * input_scales.float()).to(dtype).view(-1, rotation_block_size)
        of_torch = scaled @ hadamard(rotation_block_size).to(DEVICE, dtype) / math.sqrt(rotation_block_size)
        assert_as_good_as_torch(got, of_torch.view_as(x), truth.view_as(x))


def test_rotate_overflows_only_where_the_result_does():
    x = torch.zeros(1, 128, dtype=torch.float16, device=DEVICE)
    x[0, 5] = 60000
    input_scales = torch.full((128,), -4, dtype=torch.float16, device=DEVICE)  # 240,000 is no float16
    got = triton_launch.rotate(x, input_scales, 128)
    assert torch.equal(got.abs(), torch.full_like(x, 240000 / math.sqrt(128)))


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_gemm(index_bits, dtype, num_tokens):
    """1, 3 and 16 tokens take the skinny tile, more the wide one."""
    weight = random_weight(NUM_ROWS, 5 * 64, index_bits)
    rotated = random(num_tokens, 5 * 64, dtype=dtype)
    bias = random(NUM_ROWS, dtype=dtype, seed=2) if num_tokens != 3 else None
    got = gemm(rotated, weight, bias)
    plain = coordinates(weight)
    truth = rotated.double() @ plain.double().T * weight.row_norms.double()
    of_torch = (rotated @ plain.to(dtype).T).float() * weight.row_norms
    if bias is not None:
        truth, of_torch = truth + bias.double(), of_torch + bias.float()
    assert_as_good_as_torch(got, of_torch.to(dtype), truth)


def test_gemm_tolerance_sees_one_wrong_weight():
    weight = random_weight(NUM_ROWS, 5 * 64, 11)
    rotated = random(33, 5 * 64, dtype=torch.bfloat16)
    truth = rotated.double() @ coordinates(weight).double().T * weight.row_norms.double()
    of_torch = ((rotated @ coordinates(weight).bfloat16().T).float() * weight.row_norms).bfloat16()
    indices = unpack_planes(weight.qweight)
    indices[weight.row_norms.argmax(), 17] ^= 1 << 10  # the sign of one y
    weight.qweight = pack_planes(indices, 11)
    got = gemm(rotated, weight)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_good_as_torch(got, of_torch, truth)


@pytest.mark.parametrize("num_rows, num_units", [(1, 1), (129, 2), (64, 7)])
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_gemm_of_odd_sizes(num_rows, num_units, num_tokens):
    weight = random_weight(num_rows, 64 * num_units, 7)
    rotated = random(num_tokens, 64 * num_units)
    got = gemm(rotated, weight)
    of_torch = rotated @ coordinates(weight).T * weight.row_norms
    assert_as_good_as_torch(got, of_torch, rotated.double() @ coordinates(weight).double().T * weight.row_norms.double())


def check_dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    got = triton_launch.dequantize(tiled(weight), dtype)
    size = weight.rotation_block_size
    plain = coordinates(weight).double().view(-1, size) @ hadamard(size).to(DEVICE, torch.float64) / math.sqrt(size)
    truth = plain.view_as(got) * weight.row_norms.double()[:, None] * weight.input_scales.double()
    assert_as_good_as_torch(got, decode_weight(weight).to(dtype), truth)
    # Element by element, one step of the dtype from the truth (a little more where cancellation leaves float32's error).
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}[dtype]
    torch.testing.assert_close(got.double(), truth, rtol=step, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_dequantize(index_bits, dtype):
    check_dequantize(random_weight(NUM_ROWS, 5 * 64, index_bits), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation_block_size", ROTATION_BLOCK_SIZES)
def test_dequantize_rotation_block_sizes(rotation_block_size, dtype):
    check_dequantize(random_weight(NUM_ROWS, 3 * max(64, rotation_block_size), 11, rotation_block_size), dtype)


@pytest.mark.parametrize("num_tokens", [18, 129])
@pytest.mark.parametrize("dtype, rotation_block_size", itertools.product(DTYPES, (64, 512)))
def test_linear_end_to_end(dtype, rotation_block_size, num_tokens, monkeypatch):
    """18 tokens are multiplied with the packed weight; 129 with the decoded one, 48 rows at a time."""
    monkeypatch.setattr(triton_launch, "DEQUANTIZED_WEIGHTS", 48 * 1536)
    weight = random_weight(NUM_ROWS, 1536, 11, rotation_block_size)
    x = random(3, num_tokens // 3, 2 * 1536, dtype=dtype)[..., ::2]  # not contiguous
    bias = random(NUM_ROWS, dtype=dtype, seed=2)
    # The kernels round three times (scaled, rotated, result), the reference once: sqrt(3) < 2.
    truth = x.double() @ decode_weight(weight).double().T
    assert_as_good_as_torch(linear(x, weight), linear_reference(x, weight), truth)
    assert_as_good_as_torch(linear(x, weight, bias), linear_reference(x, weight, bias), truth + bias.double())


def test_one_workspace_at_a_time(monkeypatch):
    dequantize, made = triton_launch.dequantize, []

    def counted(*args):
        assert all(earlier() is None for earlier in made)
        out = dequantize(*args)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(triton_launch, "dequantize", counted)
    monkeypatch.setattr(triton_launch, "DEQUANTIZED_WEIGHTS", 48 * 128)
    linear(random(129, 128), random_weight(NUM_ROWS, 128, 8))
    assert len(made) == 3


@pytest.mark.parametrize("num_rows, num_inputs", [(24, 64), (100, 576)])  # the second is SmolLM2-135M's, cut for a rank
def test_every_number_of_tokens(num_rows, num_inputs):
    weight = random_weight(num_rows, num_inputs, 11)
    inputs = random(257, num_inputs, dtype=torch.bfloat16)
    truth = inputs.double() @ decode_weight(weight).double().T
    for num_tokens in range(1, 258, 1 if num_inputs == 64 else 37):
        error = linear(inputs[:num_tokens], weight).double() - truth[:num_tokens]
        assert (error.norm(dim=1) < 2**-6 * truth[:num_tokens].norm(dim=1)).all(), f"{num_tokens} tokens"


def test_no_tokens():
    weight = random_weight(NUM_ROWS, 128, 8)
    assert linear(torch.zeros(0, 128, dtype=torch.bfloat16, device=DEVICE), weight).shape == (0, NUM_ROWS)


@pytest.mark.parametrize("kernel, num_tokens", [("rotate_kernel", 1), ("gemm_kernel", 1), ("dequantize_kernel", 129)])
def test_the_op_reaches_the_triton_kernels(kernel, num_tokens, monkeypatch):
    """The tests above would pass against plain torch too: make sure that it is not what ran."""
    weight, x = random_weight(NUM_ROWS, 128, 8), random(num_tokens, 128)
    linear(x, weight)
    monkeypatch.setattr(triton_launch, kernel, None)
    with pytest.raises(TypeError, match="NoneType"):
        linear(x, weight)


def test_opcheck():
    parts = tiled(random_weight(NUM_ROWS, 128, 8))
    torch.library.opcheck(torch.ops.qamw.linear.default, (random(3, 128), *parts[:-1], None, parts.rotation_block_size))


def test_the_benchmark_gives_no_speed_for_wrong_results():
    program = runpy.run_path(str(Path(__file__).parent.parent / "kernels" / "benchmarks" / "bench_linear.py"))
    program["check"](96, 512, 8, (1, 130), DEVICE)
    program["WAYS"]["packed"] = lambda x, weight, bias: triton_launch.multiply_packed(x, weight, bias).roll(1, 1)
    with pytest.raises(SystemExit, match=r"packed, 1 tokens, 96 x 512, 8 index bits: relative error 1.*no speed is given"):
        program["check"](96, 512, 8, (1, 130), DEVICE)


@pytest.mark.parametrize("case", [(11, 64, 1, torch.bfloat16), (8, 128, 5, torch.float16), (6, 16, 40, torch.bfloat16),
                                  (12, 64, 7, torch.float32), (9, 64, 0, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("parallel", [False, True])
def test_routed_linear(case: tuple[int, int, int, torch.dtype], parallel: bool) -> None:
    """Experts of which some get no token, and with expert parallelism some are elsewhere, against a plain loop."""
    index_bits, size, num_tokens, dtype = case
    num_experts, top_k, num_inputs = 6, 2, 192 if size == 64 else 256
    weights = [random_weight(NUM_ROWS, num_inputs, index_bits, size, seed) for seed in range(num_experts)]
    for weight in weights:
        weight.input_scales.copy_(weights[0].input_scales)
    generator = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(num_experts - 1, generator=generator)[:top_k] for _ in range(num_tokens)] or
                         [torch.zeros(top_k)])[:num_tokens].int().to(DEVICE)
    here = [e for e in range(num_experts) if not parallel or e % 2]
    expert_map = torch.tensor([here.index(e) if e in here else -1 for e in range(num_experts)], dtype=torch.int32, device=DEVICE)
    block_size = triton_launch.routed_block_size(num_tokens * top_k, 1, dtype)
    routing = sort_slots(chosen, block_size, num_experts, expert_map if parallel else None)
    tiles, norms = torch.stack([tile_planes(weights[e].qweight) for e in here]), torch.stack([weights[e].row_norms for e in here])
    scales, words = weights[0].input_scales, ops.quadrant_words(index_bits, DEVICE)
    close = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}[dtype]
    # Behind the first layer of an expert, each slot has an activation of its own.
    for x in (random(num_tokens, num_inputs, dtype=dtype), random(num_tokens * top_k, num_inputs, dtype=dtype)):
        y = ops.routed_linear(x, tiles, norms, scales, words, routing, num_tokens * top_k, size)
        assert y.shape == (num_tokens * top_k, NUM_ROWS)
        for slot, expert in enumerate(chosen.flatten().tolist()):
            if expert in here:
                truth = decode_weight(weights[expert]).double() @ x[slot * len(x) // len(y)].double()
                assert (y[slot].double() - truth).norm() < close * truth.norm()
            else:
                assert not y[slot].any()


def test_slots_are_sorted() -> None:
    """What vLLM's moe_align_block_size promises: each expert's slots in order, padded to whole blocks."""
    slots, experts, num_sorted, _ = sort_slots(torch.tensor([[2, 0], [2, 3], [2, 0]], device=DEVICE), 4, 5)
    assert num_sorted.tolist() == [12] and experts.tolist()[:3] == [0, 2, 3] and set(experts.tolist()[3:]) == {-1}
    assert slots.tolist()[:12] == [1, 5, 6, 6, 0, 2, 4, 6, 3, 6, 6, 6]
