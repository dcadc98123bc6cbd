"""The layout that the kernels read: made from the planes of ``qweight`` when a model is loaded.

A tile holds 16 rows x 512 inputs (256 pairs) as ``index_bits`` x 128 words, and each of the 32
lanes of a warp reads its words 16 bytes at a time. Word ``j`` of slot ``s`` of lane ``l`` is
``tiles[row tile, input tile, j, l, s]``. A slot holds 32 pairs. The first words are the *entries*:
``entry_bits`` bits of every pair, the number of its entry of the codebook, one pair after the
other. Then come the other bits of the indices:

- for the plain code, two words with the signs of 16 pairs each. The sign of x of pair i is bit
  15 - i, that of y bit 31 - i: shifted left by i, both are where a word of two 16-bit floats has
  its signs;
- for the trellis, one word with the bits of the path, that of pair i at bit 8 * (i % 4) + i // 4.
  Of each of the 8 units of a tile, a slot has four pairs, which are four steps in a row of a path:
  one in each byte of the word, with one bit of a byte for each unit. The four steps before them are
  in the slot two slots before, ``4 * l + s - 2``; slots where ``4 * l + s`` modulo 16 is below 2
  begin the paths.

Lane, slot and pair are those of the matrix instruction m16n8k16 with the weights as its first
operand: for lane (g, t), slot (k8, r8) and pair (c, h) the row is 8 * r8 + g and the pair of the
tile 16 * c + 4 * t + 2 * h + k8, so that a decoded word is an operand's register as it is, and a
lane's activations lie side by side.
"""

import torch

from qamw_kernels.format.codebook import TRELLIS
from qamw_kernels.format.codebook import entry_bits as entry_bits_of
from qamw_kernels.format.packing import UNIT_INPUTS, unpack_planes

TILE_ROWS = 16
TILE_INPUTS = 512
_ROWS_AT_ONCE = 1024  # bounds the unpacked indices


def tiled_shape(num_rows: int, num_inputs: int, index_bits: int) -> tuple[int, int, int, int, int]:
    """Shape of the tiles of a weight [N, K]: (ceil(N / 16), ceil(K / 512), index_bits, 32, 4)."""
    return -(-num_rows // TILE_ROWS), -(-num_inputs // TILE_INPUTS), index_bits, 32, 4


def _other_bits(pair: int, index_bits: int, code: str) -> list[tuple[int, int, int]]:
    """Where a slot has the bits above an entry: (bit of the index, word, bit of the word)."""
    low = entry_bits_of(index_bits, code)
    if code == TRELLIS:
        return [(low, low, 8 * (pair % 4) + pair // 4)]
    word, bit = low + pair // 16, 15 - pair % 16
    return [(low, word, bit), (low + 1, word, bit + 16)]


def tile_planes(planes: torch.Tensor, code: str) -> torch.Tensor:
    """Tiles of a weight, from its planes.

    Args:
        planes: [index_bits, N, U] int32.
        code: of the weight, one of CODES.
    Returns:
        int32 of :func:`tiled_shape`; rows and inputs past the end have index 0.
    """
    index_bits, num_rows, num_units = planes.shape
    shape = tiled_shape(num_rows, UNIT_INPUTS * num_units, index_bits)
    tiles = torch.empty(shape, dtype=torch.int32, device=planes.device)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        part = tiles[start // TILE_ROWS : stop // TILE_ROWS]
        _tile(unpack_planes(planes[:, start:stop]), part, code)
    return tiles


def _tile(indices: torch.Tensor, tiles: torch.Tensor, code: str) -> None:
    """Fill ``tiles`` with the indices [n, K / 2] of some rows."""
    row_tiles, input_tiles, index_bits = tiles.shape[:3]
    padded = indices.new_zeros(TILE_ROWS * row_tiles, TILE_INPUTS // 2 * input_tiles)
    padded[: len(indices), : indices.shape[1]] = indices
    # [row tile, r8, g, input tile, c, t, h, k8] -> [row tile, input tile, (c, h), (g, t), (k8, r8)]
    slots = padded.view(row_tiles, 2, 8, input_tiles, 16, 4, 2, 2).permute(0, 3, 4, 6, 2, 5, 7, 1)
    slots = slots.reshape(row_tiles, input_tiles, 32, 32, 4).int()
    entry_bits = entry_bits_of(index_bits, code)
    tiles.zero_()
    for pair in range(32):
        entries = slots[:, :, pair] & ((1 << entry_bits) - 1)
        word, shift = divmod(entry_bits * pair, 32)
        tiles[:, :, word] |= entries << shift
        if shift + entry_bits > 32:
            tiles[:, :, word + 1] |= entries >> (32 - shift)
        for bit, word, place in _other_bits(pair, index_bits, code):
            tiles[:, :, word] |= (slots[:, :, pair] >> bit & 1) << place


def untile(tiles: torch.Tensor, num_rows: int, num_inputs: int, code: str) -> torch.Tensor:
    """Indices [N, K / 2] int16 that ``tiles`` hold.

    The inverse of :func:`tile_planes`, except that planes are packed and these indices are not.
    """
    row_tiles, input_tiles, index_bits = tiles.shape[:3]
    entry_bits = entry_bits_of(index_bits, code)
    slots = torch.empty(row_tiles, input_tiles, 32, 32, 4, dtype=torch.int16, device=tiles.device)
    for pair in range(32):
        word, shift = divmod(entry_bits * pair, 32)
        entries = (tiles[:, :, word] >> shift) & ((1 << min(entry_bits, 32 - shift)) - 1)
        if shift + entry_bits > 32:
            entries = entries | (tiles[:, :, word + 1] << (32 - shift))
        indices = entries & ((1 << entry_bits) - 1)
        for bit, word, place in _other_bits(pair, index_bits, code):
            indices = indices | (tiles[:, :, word] >> place & 1) << bit
        slots[:, :, pair] = indices.short()
    padded = slots.view(row_tiles, input_tiles, 16, 2, 8, 4, 2, 2).permute(0, 7, 4, 1, 2, 5, 3, 6)
    return padded.reshape(TILE_ROWS * row_tiles, -1)[:num_rows, : num_inputs // 2].contiguous()
