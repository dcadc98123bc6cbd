"""Tiles hold the indices, wherever the weight ends within a tile."""

import pytest
import torch

from qamw_kernels.codec.trellis import codebook_rows
from qamw_kernels.format.codebook import CODES, INDEX_BITS, TRELLIS
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.ops.tiling import tile_planes, untile


@pytest.mark.parametrize("num_rows, num_inputs", [(70, 4608), (1, 64), (1100, 576)])
@pytest.mark.parametrize("index_bits", INDEX_BITS)
@pytest.mark.parametrize("code", CODES)
def test_tiles_hold_the_indices(code: str, index_bits: int, num_rows: int, num_inputs: int) -> None:
    indices = torch.randint(0, 2**index_bits, (num_rows, num_inputs // 2)).short()
    tiles = tile_planes(pack_planes(indices, index_bits), code)
    assert torch.equal(untile(tiles, num_rows, num_inputs, code), indices)


def test_paths_are_bytes_of_a_word_and_of_the_one_two_slots_before() -> None:
    """How kernels find the three bits before a pair, against the codec: all signs of 8 units."""
    index_bits = 6
    indices = torch.randint(0, 2**index_bits, (16, 256)).short()
    tile = tile_planes(pack_planes(indices, index_bits), TRELLIS)[0, 0]
    path = tile[index_bits - 1].flatten().long() & 0xFFFFFFFF
    first = torch.arange(128) % 16 < 2
    previous = torch.where(first, 0, path.roll(2))
    one, two, three = (
        (path << 8 * steps | previous >> 32 - 8 * steps) & 0xFFFFFFFF for steps in (1, 2, 3)
    )
    y = path ^ two ^ three
    x = y ^ one
    flips = [[(sign >> 8 * (pair % 4) + pair // 4 & 1) for sign in (x, y)] for pair in range(32)]
    found = torch.stack([flipped[0] + 2 * flipped[1] for flipped in flips])  # [pair, slot]
    rows = codebook_rows(indices, index_bits)
    expected = rows >> index_bits - 1
    # As tiles have them: [r8, g, c, t, h, k8] -> [(c, h), (g, t), (k8, r8)]
    slots = expected.view(2, 8, 16, 4, 2, 2).permute(2, 4, 1, 3, 5, 0).reshape(32, 128)
    assert torch.equal(found.short(), slots)
