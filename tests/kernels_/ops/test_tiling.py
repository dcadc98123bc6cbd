"""Tiles hold the indices, wherever the weight ends within a tile."""

import pytest
import torch

from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.ops.tiling import tile_planes, untile


@pytest.mark.parametrize("num_rows, num_inputs", [(70, 4608), (1, 64), (1100, 576)])
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_tiles_hold_the_indices(index_bits: int, num_rows: int, num_inputs: int) -> None:
    indices = torch.randint(0, 2**index_bits, (num_rows, num_inputs // 2)).short()
    tiles = tile_planes(pack_planes(indices, index_bits))
    assert torch.equal(untile(tiles, num_rows, num_inputs), indices)
