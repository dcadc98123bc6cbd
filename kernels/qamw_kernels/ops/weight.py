"""A weight as the kernels read it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qamw_kernels.format.codebook import load_quadrant
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.tiling import TILE_ROWS, tile_planes


@functools.lru_cache(maxsize=64)
def quadrant_words(index_bits: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The kernels' copy of a codebook's quadrant: two bfloat16 per word, x in the low half.

    Cached per (index_bits, device): treat it as read-only, and ask for it when a model is loaded,
    not in a CUDA graph.

    Returns:
        [C / 4] int32.
    Raises:
        ValueError: ``index_bits`` is not in 6..12.
    """
    return load_quadrant(index_bits).bfloat16().view(torch.int32)[:, 0].to(device)


class TiledWeight(NamedTuple):
    """A weight [N, K], or those of several experts, in the layout of the kernels.

    Attributes:
        tiles: [ceil(N / 16), ceil(K / 512), index_bits, 32, 4] int32, see
            :mod:`qamw_kernels.ops.tiling`; [experts, ...] of experts.
        row_norms: [N] float32; [experts, N] of experts.
        input_scales: [K] float16; experts share them.
        quadrant_words: [C / 4] int32, of :func:`quadrant_words`.
        rotation_block_size: Hadamard width, divides K.
    """

    tiles: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    quadrant_words: torch.Tensor
    rotation_block_size: int

    @property
    def index_bits(self) -> int:
        """Bits per pair."""
        return self.tiles.shape[-3]

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
            tile_planes(quantized.qweight),
            quantized.row_norms,
            quantized.input_scales,
            quadrant_words(quantized.index_bits, quantized.qweight.device),
            quantized.rotation_block_size,
        )

    @staticmethod
    def of_experts(experts: Sequence[QuantizedWeight]) -> "TiledWeight":
        """Tiles of the experts of a layer, which have one shape, one rate and one input_scales."""
        tiles = torch.stack([tile_planes(expert.qweight) for expert in experts])
        row_norms = torch.stack([expert.row_norms for expert in experts])
        return TiledWeight(
            tiles,
            row_norms,
            experts[0].input_scales,
            quadrant_words(experts[0].index_bits, tiles.device),
            experts[0].rotation_block_size,
        )
