"""The weight as kernels read it: tiles, and the kernels' copy of the codebook."""

import pytest
import torch

from qamw_kernels.format.codebook import CODES, INDEX_BITS, PLAIN, entry_bits, load_entries
from qamw_kernels.format.packing import unpack_planes
from qamw_kernels.ops.tiling import tile_planes, tiled_shape, untile
from qamw_kernels.ops.weight import Rate, TiledWeight, entry_words
from tests.helpers.weights import random_weight


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_entry_words(index_bits: int, code: str) -> None:
    words = entry_words(index_bits, code, "cpu")
    assert words.shape == (2 ** entry_bits(index_bits, code),) and words.dtype == torch.int32
    x, y = ((words << 16).view(torch.float32), (words >> 16 << 16).view(torch.float32))
    assert torch.equal(torch.stack((x, y), 1), load_entries(index_bits, code))
    assert entry_words(index_bits, code, "cpu") is words


def test_entry_words_of_an_unknown_rate() -> None:
    with pytest.raises(ValueError, match=r"6\.\.12, got 13"):
        entry_words(13, PLAIN, "cpu")


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_a_tiled_weight_is_the_quantized_one(index_bits: int, code: str) -> None:
    weight = random_weight(70, 640, index_bits, code=code)
    tiled = TiledWeight.of(weight)
    assert (tiled.index_bits, tiled.num_rows, tiled.num_inputs) == (index_bits, 70, 640)
    assert (tiled.code, tiled.rate) == (code, Rate(index_bits, code))
    assert tiled.rotation_block_size == weight.rotation_block_size
    assert tiled.tiles.shape == tiled_shape(70, 640, index_bits)
    assert torch.equal(tiled.tiles, tile_planes(weight.qweight, code))
    assert torch.equal(untile(tiled.tiles, 70, 640, code), unpack_planes(weight.qweight))
    assert torch.equal(tiled.row_norms, weight.row_norms)
    assert torch.equal(tiled.input_scales, weight.input_scales)
    assert torch.equal(tiled.entry_words, entry_words(index_bits, code, "cpu"))


def test_rows_of_a_tiled_weight() -> None:
    weight = random_weight(70, 640, 9)
    part = TiledWeight.of(weight).rows(16, 48)
    assert (part.num_rows, part.num_inputs, part.index_bits) == (32, 640, 9)
    assert torch.equal(untile(part.tiles, 32, 640, PLAIN), unpack_planes(weight.qweight)[16:48])
    assert torch.equal(part.row_norms, weight.row_norms[16:48])
    rest = TiledWeight.of(weight).rows(48, 96)  # past the end
    assert torch.equal(untile(rest.tiles, 22, 640, PLAIN), unpack_planes(weight.qweight)[48:])
    assert rest.num_rows == 22


def test_contiguous() -> None:
    tiled = TiledWeight.of(random_weight(32, 640, 9))
    spread = tiled._replace(
        tiles=tiled.tiles.repeat_interleave(2, 0)[::2],
        row_norms=tiled.row_norms.repeat_interleave(2)[::2],
        input_scales=tiled.input_scales.repeat_interleave(2)[::2],
    )
    assert not spread.row_norms.is_contiguous()
    packed = spread.contiguous()
    for found, expected in zip(packed[:4], tiled[:4], strict=True):
        assert found.is_contiguous() and torch.equal(found, expected)


def test_experts_share_input_scales() -> None:
    experts = [random_weight(20, 192, 9, seed=seed) for seed in range(3)]
    for expert in experts:
        expert.input_scales.copy_(experts[0].input_scales)
    tiled = TiledWeight.of_experts(experts)
    assert tiled.tiles.shape == (3, *tiled_shape(20, 192, 9))
    assert tiled.row_norms.shape == (3, 20)
    assert (tiled.index_bits, tiled.num_rows, tiled.num_inputs) == (9, 20, 192)
    assert torch.equal(tiled.input_scales, experts[0].input_scales)
    for expert, tiles, norms in zip(experts, tiled.tiles, tiled.row_norms, strict=True):
        assert torch.equal(untile(tiles, 20, 192, PLAIN), unpack_planes(expert.qweight))
        assert torch.equal(norms, expert.row_norms)
