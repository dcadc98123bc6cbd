"""The codec in plain torch: bits are exact, the nearest codeword is the nearest, and bad input is refused."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qamw_kernels.codec import encode as codec
from qamw_kernels.format.codebook import INDEX_BITS, load_codebook, load_quadrant
from qamw_kernels.codec.encode import InputShard, QuantizedWeight, decode_weight, encode_weight, linear_reference, make_input_scales
from qamw_kernels.codec.nearest import _grid, nearest, nearest_brute_force
from qamw_kernels.format.packing import field_widths, pack_planes, unpack_planes
from qamw_kernels.codec.rotation import ROTATION_BLOCK_SIZES, hadamard, rotate, unrotate

NMSE_CEILING = {6: 0.0307, 7: 0.0156, 8: 0.00785, 9: 0.00398, 10: 0.0020, 11: 0.00101, 12: 0.000507}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_packing_is_exact(index_bits: int) -> None:
    indices = torch.randint(0, 2**index_bits, (7, 96), dtype=torch.int16)
    indices[0, :2] = torch.tensor([0, 2**index_bits - 1])
    planes = pack_planes(indices, index_bits)
    assert planes.shape == (index_bits, 7, 3) and planes.dtype == torch.int32
    assert torch.equal(unpack_planes(planes), indices)


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_a_shard_of_packed_planes_unpacks_alone(index_bits: int) -> None:
    """Tensor parallelism cuts planes down to as little as one unit of one row."""
    indices = torch.randint(0, 2**index_bits, (3, 128), dtype=torch.int16)
    shard = pack_planes(indices, index_bits)[:, 1:2, 2:3]
    assert torch.equal(unpack_planes(shard), indices[1:2, 64:96])


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_packing_is_as_documented(index_bits: int) -> None:
    """A reader written from kernels/FORMAT.md alone: one field of one pair at a time, in plain integers."""
    indices = torch.randint(0, 2**index_bits, (2, 64))
    words = pack_planes(indices, index_bits).numpy().astype("uint32")  # [index_bits, N, U]
    for row in range(2):
        for pair in range(64):
            unit, within = divmod(pair, 32)
            value = first_word = low_bit = 0
            for width in (8, 4, 2, 1):
                if index_bits & width:
                    word, position = divmod(within, 32 // width)
                    field = int(words[first_word + word, row, unit]) >> (position * width) & (2**width - 1)
                    value |= field << low_bit
                    first_word, low_bit = first_word + width, low_bit + width
            assert value == indices[row, pair]


def test_fields_add_up() -> None:
    for index_bits in INDEX_BITS:
        assert sum(field_widths(index_bits)) == index_bits


@pytest.mark.parametrize("size", ROTATION_BLOCK_SIZES)
def test_rotation_is_the_hadamard_matrix(size: int) -> None:
    x = torch.randn(5, 3 * size, dtype=torch.float64)
    expected = (x.view(-1, size) @ hadamard(size).double() / math.sqrt(size)).view_as(x)
    torch.testing.assert_close(rotate(x, size), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(unrotate(rotate(x, size), size), x, rtol=0, atol=1e-13)


def test_rotation_does_not_depend_on_batching() -> None:
    x = torch.randn(9, 256)
    assert torch.equal(rotate(x, 64)[3:4], rotate(x[3:4], 64))


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_nearest_equals_brute_force(index_bits: int) -> None:
    codebook = load_codebook(index_bits)
    middle = (codebook[:-1] + codebook[1:]) / 2  # ties, or nearly
    far = torch.randn(500, 2) * torch.tensor([10.0, 1e9])
    special = torch.tensor([[0.0, 0.0], [-0.0, 0.0], [0.0, -0.0], [6.0, 6.0], [5.9999995, 0.0], [1e30, -1e30], [-1e-9, 0.5]])
    points = torch.cat([torch.randn(30_000, 2), 2 * torch.randn(5_000, 2), middle, codebook, far, special])
    indices = nearest(points, index_bits)
    assert torch.equal(indices, nearest_brute_force(points, index_bits))
    # And against the whole codebook in float64: no codeword of any quadrant is nearer.
    near = points.abs().amax(1) < 100
    distance = torch.cdist(points[near].double(), codebook.double())
    chosen = distance.gather(1, indices[near].long()[:, None])[:, 0]
    assert float((chosen - distance.amin(1)).max()) < 1e-6


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_codewords_encode_to_themselves(index_bits: int) -> None:
    codebook = load_codebook(index_bits)
    assert torch.equal(nearest(codebook, index_bits), torch.arange(2**index_bits, dtype=torch.int16))


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_codebook_properties(index_bits: int) -> None:
    quadrant, codebook = load_quadrant(index_bits), load_codebook(index_bits)
    assert (quadrant > 0).all() and torch.equal(quadrant.bfloat16().float(), quadrant) and torch.equal(quadrant.half().float(), quadrant)
    assert len(codebook.unique(dim=0)) == 2**index_bits
    assert sorted(quadrant.tolist()) == quadrant.tolist()
    m = len(quadrant) // 3
    assert torch.equal(codebook[m + 3 * len(quadrant)], -quadrant[m])


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_codebook_distortion_by_an_independent_computation(index_bits: int) -> None:
    """Monte Carlo with SciPy's k-d tree and NumPy's generator: no line in common with the fit."""
    import numpy as np
    from scipy.spatial import cKDTree

    points = np.random.default_rng(7).standard_normal((2_000_000, 2))
    distance, _ = cKDTree(load_codebook(index_bits).double().numpy()).query(points, workers=-1)
    nmse = float((distance**2).mean() / 2)
    assert 0.95 * 2.0157 / 2**index_bits < nmse <= NMSE_CEILING[index_bits]  # the high-rate limit of any 2D quantiser is 2.0157 / C


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_encode_decode_error(index_bits: int) -> None:
    """An uneven weight: rotation makes it nearly Gaussian, so the error is nearly the codebook's."""
    weight = torch.randn(64, 512) * torch.rand(64, 1) * (torch.rand(512) + 0.5)
    decoded = decode_weight(encode_weight(weight, index_bits, 128, make_input_scales(512)))
    nmse = float((decoded - weight).square().sum() / weight.square().sum())
    assert nmse <= 1.05 * NMSE_CEILING[index_bits]


def test_linear_reference_is_the_decoded_weight() -> None:
    weight, x, bias = torch.randn(33, 192), torch.randn(2, 5, 192), torch.randn(33)
    quantized = encode_weight(weight, 11, 64, make_input_scales(192, torch.rand(192) + 0.5))
    torch.testing.assert_close(linear_reference(x, quantized, bias), x @ decode_weight(quantized).T + bias, rtol=1e-4, atol=1e-4)


def test_encoding_rows_alone_gives_the_same_bits() -> None:
    weight, scales = torch.randn(40, 256), make_input_scales(256)
    whole, one = encode_weight(weight, 9, 128, scales), encode_weight(weight[17:18], 9, 128, scales)
    assert torch.equal(whole.qweight[:, 17:18], one.qweight) and torch.equal(whole.row_norms[17:18], one.row_norms)


def weight_with_outliers() -> torch.Tensor:
    """[64, 896]; two rows have large weights that their rotation block cannot hide."""
    weight = torch.randn(64, 896, generator=torch.Generator().manual_seed(0))
    weight[3, 100:104], weight[40, 700:703] = 40, -90
    return weight


@pytest.mark.parametrize("index_bits", [6, 11])
def test_large_weights_do_not_leave_the_codebook(index_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scales = weight_with_outliers(), make_input_scales(896)
    quantized = encode_weight(weight, index_bits, 128, scales)
    monkeypatch.setattr(codec, "row_factors", lambda coordinates, code, shard: torch.ones(len(coordinates)))
    plain = encode_weight(weight, index_bits, 128, scales)
    error, plain_error = ((decode_weight(q) - weight).square().sum(1) for q in (quantized, plain))
    raised = quantized.row_norms / plain.row_norms
    assert raised[3] > 1.2 and raised[40] > 1.2 and (raised > 1).sum() == 2
    assert (error[[3, 40]] < 0.7 * plain_error[[3, 40]]).all()
    assert torch.equal(quantized.qweight[:, raised == 1], plain.qweight[:, raised == 1])


def test_shards_that_add_up_their_sums_are_those_of_the_whole() -> None:
    weight, scales = weight_with_outliers(), make_input_scales(896)
    boxes, barrier = [torch.empty(0)] * 2, threading.Barrier(2)

    def encode(rank: int) -> QuantizedWeight:
        def add_up(sums: torch.Tensor) -> torch.Tensor:
            boxes[rank] = sums
            barrier.wait()
            total = boxes[0] + boxes[1]
            barrier.wait()
            return total

        part = slice(0, 384) if rank == 0 else slice(384, 896)
        return encode_weight(weight[:, part], 11, 128, scales[part], weights_at_once=1 << 30, shard=InputShard(896, add_up))

    with ThreadPoolExecutor(2) as pool:
        shards = list(pool.map(encode, range(2)))
    whole = encode_weight(weight, 11, 128, scales)
    assert all(torch.equal(shard.row_norms, whole.row_norms) for shard in shards)
    assert torch.equal(torch.cat([shard.qweight for shard in shards], 2), whole.qweight)


def test_one_rotation_block_per_row_and_inputs_left_alone() -> None:
    weight, x = torch.randn(5, 128), torch.randn(1, 64)
    quantized, before = encode_weight(weight, 11, 128, make_input_scales(128)), x.clone()
    assert float((decode_weight(quantized) - weight).square().mean()) < 0.002
    assert rotate(weight, 128).is_contiguous()
    rotate(x, 64)
    assert torch.equal(x, before)


def test_a_row_beyond_float32_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"up_proj: row 2 .* overflows float32"):
        encode_weight(torch.tensor([[1.0], [0.0], [3e38]]).expand(3, 64), 11, 64, make_input_scales(64, torch.full((64,), 8.0)), "up_proj")


def test_zero_rows_decode_to_exact_zeros() -> None:
    weight = torch.randn(4, 128)
    weight[2] = 0
    quantized = encode_weight(weight, 11, 64, make_input_scales(128))
    assert quantized.row_norms[2] == 0 and (decode_weight(quantized)[2] == 0).all()
    assert quantized.qweight.shape == (11, 4, 2)


def test_extreme_magnitudes_survive() -> None:
    weight = (torch.randn(3, 128) * torch.tensor([[1e-30], [1.0], [3e37]])).bfloat16()
    decoded = decode_weight(encode_weight(weight, 11, 64, make_input_scales(128)))
    relative = ((decoded.double() - weight.double()).square().sum(1) / weight.double().square().sum(1)).tolist()
    assert max(relative) < 0.003


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight = torch.randn(4, 128)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match=r"down_proj\.weight\[1, 7\] is -?(nan|inf)"):
        encode_weight(weight, 11, 64, make_input_scales(128), "down_proj.weight")


@pytest.mark.parametrize("num_inputs", [1, 63, 100, 0])
def test_widths_without_whole_units_are_refused(num_inputs: int) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        encode_weight(torch.ones(2, num_inputs), 11, 64, torch.ones(num_inputs).half())


def test_input_scales_outside_float16_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_scales\[3\]"):
        make_input_scales(64, torch.tensor([1.0] * 3 + [1e9] + [1.0] * 60))


def test_one_row_layer() -> None:
    weight = torch.randn(1, 64)
    assert decode_weight(encode_weight(weight, 12, 64, make_input_scales(64))).shape == (1, 64)


def test_default_dtype_does_not_matter(while_vllm_loads) -> None:
    weight = torch.randn(40, 256)
    weight[5, :3] = 40  # a row whose norm is raised
    expected = encode_weight(weight, 11, 128, make_input_scales(256))
    decoded = decode_weight(expected)
    for cached in (_grid, load_codebook):
        cached.cache_clear()
    with while_vllm_loads():
        found = encode_weight(weight, 11, 128, make_input_scales(256))
        assert torch.equal(decode_weight(found), decoded)
    for name in ("qweight", "row_norms", "input_scales"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert hadamard(16).dtype == torch.float32
