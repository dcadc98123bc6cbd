"""The nearest codeword is the nearest."""

import pytest
import torch

from qamw_kernels.codec.nearest import (
    grid,
    nearest,
    nearest_brute_force,
    nearest_entry,
    nearest_entry_brute_force,
)
from qamw_kernels.format.codebook import INDEX_BITS, TRELLIS, load_codebook, load_entries

SPECIAL = torch.tensor(
    [
        [0.0, 0.0],
        [-0.0, 0.0],
        [0.0, -0.0],
        [6.0, 6.0],
        [5.9999995, 0.0],
        [1e30, -1e30],
        [-1e-9, 0.5],
    ]
)


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_nearest_equals_brute_force(index_bits: int) -> None:
    codebook = load_codebook(index_bits)
    middle = (codebook[:-1] + codebook[1:]) / 2  # ties, or nearly
    far = torch.randn(500, 2) * torch.tensor([10.0, 1e9])
    usual = torch.randn(30_000, 2), 2 * torch.randn(5_000, 2)
    points = torch.cat([*usual, middle, codebook, far, SPECIAL])
    indices = nearest(points, index_bits)
    assert torch.equal(indices, nearest_brute_force(points, index_bits))
    # And against the whole codebook in float64: no codeword of any quadrant is nearer.
    near = points.abs().amax(1) < 100
    distance = torch.cdist(points[near].double(), codebook.double())
    chosen = distance.gather(1, indices[near].long()[:, None])[:, 0]
    assert float((chosen - distance.amin(1)).max()) < 1e-6


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_nearest_entry_of_the_trellis_equals_brute_force(index_bits: int) -> None:
    entries = load_entries(index_bits, TRELLIS)
    middle = (entries[:-1] + entries[1:]) / 2  # ties, or nearly
    far = torch.randn(500, 2) * torch.tensor([10.0, 1e9])
    points = torch.cat([torch.randn(30_000, 2), 3 * torch.randn(5_000, 2), middle, far, SPECIAL])
    x, y = points.T.contiguous()
    found = nearest_entry(x, y, grid(index_bits, TRELLIS, points.device))
    assert torch.equal(found, nearest_entry_brute_force(x, y, entries))


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_codewords_encode_to_themselves(index_bits: int) -> None:
    codebook = load_codebook(index_bits)
    expected = torch.arange(2**index_bits, dtype=torch.int16)
    assert torch.equal(nearest(codebook, index_bits), expected)
