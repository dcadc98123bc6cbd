"""A weight as the kernels read it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qamw_kernels.format.codebook import PLAIN, TRELLIS, entry_bits, load_entries
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.tiling import TILE_ROWS, tile_planes


@functools.lru_cache(maxsize=64)
def entry_words(index_bits: int, code: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The kernels' copy of a codebook's entries: two bfloat16 per word, x in the low half.

    Cached per (index_bits, code, device): treat it as read-only, and ask for it when a model is
    loaded, not in a CUDA graph.

    Returns:
        [2**entry_bits] int32.
    Raises:
        ValueError: ``index_bits`` is not in 6..12.
    """
    return load_entries(index_bits, code).bfloat16().view(torch.int32)[:, 0].to(device)


class Rate(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        index_bits: bits per pair.
        code: one of CODES.
    """

    index_bits: int
    code: str = PLAIN

    @property
    def entry_bits(self) -> int:
        """Bits of an index that are the number of an entry; they determine the size of tables."""
        return entry_bits(self.index_bits, self.code)


class TiledWeight(NamedTuple):
    """A weight [N, K], or those of several experts, in the layout of the kernels.

    Attributes:
        tiles: [ceil(N / 16), ceil(K / 512), index_bits, 32, 4] int32, see
            :mod:`qamw_kernels.ops.tiling`; [experts, ...] of experts.
        row_norms: [N] float32; [experts, N] of experts.
        input_scales: [K] float16; experts share them.
        entry_words: [2**entry_bits] int32, of :func:`entry_words`. Their number shows which code it
            is.
        rotation_block_size: Hadamard width, divides K.
    """

    tiles: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    entry_words: torch.Tensor
    rotation_block_size: int

    @property
    def index_bits(self) -> int:
        """Bits per pair."""
        return self.tiles.shape[-3]

    @property
    def code(self) -> str:
        """One of CODES."""
        trellis = len(self.entry_words) == 1 << entry_bits(self.index_bits, TRELLIS)
        return TRELLIS if trellis else PLAIN

    @property
    def rate(self) -> Rate:
        """What kernels for this weight are compiled for."""
        return Rate(self.index_bits, self.code)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.row_norms.shape[-1]

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.input_scales.shape[0]

    def rows(self, start: int, stop: int) -> "TiledWeight":
        """Some rows of a weight; ``start`` and ``stop`` are multiples of TILE_ROWS."""
        return self._replace(
            tiles=self.tiles[start // TILE_ROWS : stop // TILE_ROWS],
            row_norms=self.row_norms[start:stop],
        )

    def expert(self, number: int) -> "TiledWeight":
        """The weight of one of several experts."""
        return self._replace(tiles=self.tiles[number], row_norms=self.row_norms[number])

    def contiguous(self) -> "TiledWeight":
        """The same weight with its tensors as the kernels need them; copies only where needed."""
        return self._replace(
            tiles=self.tiles.contiguous(),
            row_norms=self.row_norms.contiguous(),
            input_scales=self.input_scales.contiguous(),
        )

    @staticmethod
    def of(quantized: QuantizedWeight) -> "TiledWeight":
        """Tiles of a stored weight, on its device; row norms and input scales are shared."""
        return TiledWeight(
            tile_planes(quantized.qweight, quantized.code),
            quantized.row_norms,
            quantized.input_scales,
            entry_words(quantized.index_bits, quantized.code, quantized.qweight.device),
            quantized.rotation_block_size,
        )

    @staticmethod
    def of_experts(experts: Sequence[QuantizedWeight]) -> "TiledWeight":
        """Tiles of the experts of a layer, which have one shape, code, rate and input_scales."""
        ((index_bits, code),) = {(expert.index_bits, expert.code) for expert in experts}
        tiles = torch.stack([tile_planes(expert.qweight, code) for expert in experts])
        row_norms = torch.stack([expert.row_norms for expert in experts])
        return TiledWeight(
            tiles,
            row_norms,
            experts[0].input_scales,
            entry_words(index_bits, code, tiles.device),
            experts[0].rotation_block_size,
        )
