"""The alternative to trellis-coded QAM: a bit-shift trellis over weights, as in QTIP and EXL3.

Every weight shifts its bits into a window of the last bits of its row, and a fixed table says which
value a window stands for (arXiv 2406.11235). For rates in half bits, weights alternate between the
whole bits below and above.
A row begins with the window 0 and may end with any.
"""

from typing import NamedTuple

import torch

ROWS_AT_ONCE = 8  # the costs of all windows stay in cache
SPREADS = {8: 1.3, 12: 1.3, 16: 1.1}
"""Bits of the window -> standard deviation of the values, enough for the largest coordinates."""


class Window(NamedTuple):
    """A bit-shift trellis.

    Attributes:
        bits: of a window, L.
        index_bits: of two weights, b; the first has b // 2 of them.
        values: [2^L] float32.
    """

    bits: int
    index_bits: int
    values: torch.Tensor

    @classmethod
    def of(cls, bits: int, index_bits: int) -> "Window":
        """Quantiles of a normal in a pseudo-random order: as many as there are windows."""
        generator = torch.Generator().manual_seed(bits)
        order = torch.randperm(1 << bits, generator=generator, dtype=torch.int64)
        quantiles = torch.special.ndtri((order.double() + 0.5) / (1 << bits))
        return cls(bits, index_bits, SPREADS[bits] * quantiles.float())

    def shift(self, i: int) -> int:
        """Bits of weight i of a row."""
        return (self.index_bits + i % 2) // 2


def encode(coordinates: torch.Tensor, window: Window) -> torch.Tensor:
    """The path with the least squared error of every row, by Viterbi's algorithm.

    Args:
        coordinates: [N, K] float32.
    Returns:
        [N, K] int64: the bits of every weight.
    """
    return torch.cat([_encode(rows, window) for rows in coordinates.split(ROWS_AT_ONCE)])


def _encode(coordinates: torch.Tensor, window: Window) -> torch.Tensor:
    num_rows, num_weights = coordinates.shape
    cost = torch.full((num_rows, 1 << window.bits), torch.inf)
    cost[:, 0] = 0
    lost = []  # by the bits that a window keeps, the best bits to lose, [N, 2^(L - k)]
    for i in range(num_weights):
        shift = window.shift(i)
        least, at = cost.view(num_rows, 1 << shift, -1).min(1)
        lost.append(at.short())
        added = (coordinates[:, i, None] - window.values).square_()
        cost = added.view(num_rows, -1, 1 << shift).add_(least[..., None]).flatten(1)
    end = cost.argmin(1)
    coded = torch.empty(num_rows, num_weights, dtype=torch.int64)
    for i in reversed(range(num_weights)):
        shift = window.shift(i)
        coded[:, i] = end & ((1 << shift) - 1)
        kept = end >> shift
        end = lost[i].gather(1, kept[:, None])[:, 0].long() << (window.bits - shift) | kept
    return coded


def decode(coded: torch.Tensor, window: Window) -> torch.Tensor:
    """Coordinates [N, K] float32 of the bits [N, K] int64 of every weight."""
    decoded = torch.empty(coded.shape)
    register = torch.zeros(len(coded), dtype=torch.int64)
    for i in range(coded.shape[1]):
        register = (register << window.shift(i) | coded[:, i]) & ((1 << window.bits) - 1)
        decoded[:, i] = window.values[register]
    return decoded
