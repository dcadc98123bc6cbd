"""Packing of indices into planes: exact, also of a shard alone, and as docs/format.md has it."""

import pytest
import torch

from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.format.packing import field_widths, pack_planes, unpack_planes, unpacked_shape


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_packing_is_exact(index_bits: int) -> None:
    indices = torch.randint(0, 2**index_bits, (7, 96), dtype=torch.int16)
    indices[0, :2] = torch.tensor([0, 2**index_bits - 1])
    planes = pack_planes(indices, index_bits)
    assert planes.shape == (index_bits, 7, 3) and planes.dtype == torch.int32
    assert unpacked_shape(planes.shape) == (7, 192)
    assert torch.equal(unpack_planes(planes), indices)


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_a_shard_of_packed_planes_unpacks_alone(index_bits: int) -> None:
    """Tensor parallelism cuts planes down to as little as one unit of one row."""
    indices = torch.randint(0, 2**index_bits, (3, 128), dtype=torch.int16)
    shard = pack_planes(indices, index_bits)[:, 1:2, 2:3]
    assert torch.equal(unpack_planes(shard), indices[1:2, 64:96])


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_packing_is_as_documented(index_bits: int) -> None:
    """A reader written from docs/format.md alone: field by field, in plain integers."""
    indices = torch.randint(0, 2**index_bits, (2, 64))
    words = pack_planes(indices, index_bits).numpy().astype("uint32")  # [index_bits, N, U]
    for row in range(2):
        for pair in range(64):
            unit, within = divmod(pair, 32)
            value = first_word = low_bit = 0
            for width in (8, 4, 2, 1):
                if index_bits & width:
                    word, position = divmod(within, 32 // width)
                    shifted = int(words[first_word + word, row, unit]) >> (position * width)
                    value |= (shifted & (2**width - 1)) << low_bit
                    first_word, low_bit = first_word + width, low_bit + width
            assert value == indices[row, pair]


def test_fields_add_up() -> None:
    for index_bits in INDEX_BITS:
        assert sum(field_widths(index_bits)) == index_bits
