"""Packing of pair indices into the planes stored as ``qweight``, exactly: unpack(pack(x)) == x.

From the lowest bit up, the ``b`` bits of an index are split into fields, one for every power of two
in b, the widest first: 11 = 8 + 2 + 1, 7 = 4 + 2 + 1. A unit is 32 neighboring pairs (64 inputs) of
one row.
Its fields of width w fill exactly w int32 words, 32 / w pairs per word, so no field ever straddles
a word and every unit is b words.
"""

from collections.abc import Sequence

import torch

UNIT_PAIRS = 32
UNIT_INPUTS = 2 * UNIT_PAIRS


def field_widths(index_bits: int) -> tuple[int, ...]:
    """Widths of the fields of an index, lowest bits first: (8, 2, 1) for 11."""
    return tuple(width for width in (8, 4, 2, 1) if index_bits & width)


def packed_shape(num_rows: int, num_inputs: int, index_bits: int) -> tuple[int, int, int]:
    """Shape of ``qweight`` for a weight [N, K]: (index_bits, N, K / 64).

    Raises:
        ValueError: K is not a positive multiple of 64.
    """
    if num_inputs <= 0 or num_inputs % UNIT_INPUTS:
        raise ValueError(
            f"the number of inputs must be a positive multiple of {UNIT_INPUTS}, got {num_inputs}"
        )
    return index_bits, num_rows, num_inputs // UNIT_INPUTS


def unpacked_shape(planes: Sequence[int]) -> tuple[int, int]:
    """Shape [N, K] of the weight whose ``qweight`` has the three sizes ``planes``."""
    _, num_rows, num_units = planes
    return num_rows, num_units * UNIT_INPUTS


def pack_planes(indices: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Pack indices into planes.

    Args:
        indices: [N, P] of any integer dtype, values below 2**index_bits.
    Returns:
        [index_bits, N, P / 32] int32.
    Raises:
        ValueError: P is not a positive multiple of 32.
    """
    num_rows, num_pairs = indices.shape
    shape = packed_shape(num_rows, 2 * num_pairs, index_bits)
    planes = torch.empty(shape, dtype=torch.int32, device=indices.device)
    units = indices.reshape(num_rows, -1, UNIT_PAIRS)
    low_bit = 0
    for width in field_widths(index_bits):
        fields = ((units >> low_bit) & ((1 << width) - 1)).to(torch.uint8)
        while width < 8:  # merge neighbors until a field fills a byte
            fields = fields[..., 0::2] | (fields[..., 1::2] << width)
            width *= 2
        words = fields.contiguous().view(torch.int32)  # [N, U, words], little-endian
        planes[low_bit : low_bit + words.shape[2]] = words.permute(2, 0, 1)
        low_bit += words.shape[2]
    return planes


def unpack_planes(planes: torch.Tensor) -> torch.Tensor:
    """Unpack planes [index_bits, N, U] int32 into indices [N, 32 * U] int16."""
    index_bits, num_rows, num_units = planes.shape
    indices = torch.zeros(num_rows, num_units * UNIT_PAIRS, dtype=torch.int16, device=planes.device)
    low_bit = 0
    for width in field_widths(index_bits):
        words = planes[low_bit : low_bit + width].permute(1, 2, 0)  # [N, U, width]
        words = words.reshape(num_rows, -1)
        # clone(), because contiguous() keeps odd strides of dimensions of size 1, which view()
        # refuses
        fields = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        field_bits = 8
        while field_bits > width:  # split bytes until one field is left in each
            field_bits //= 2
            mask = (1 << field_bits) - 1
            fields = torch.stack((fields & mask, fields >> field_bits), dim=-1).flatten(1)
        indices |= fields.to(torch.int16) << low_bit
        low_bit += width
    return indices
