"""The codebooks: symmetric, exact in 16 bits, and as good as theory allows."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from qamw_kernels.format.codebook import (
    INDEX_BITS,
    PLAIN,
    TRELLIS,
    flip_signs,
    load_codebook,
    load_entries,
)
from tests.helpers.weights import NMSE_CEILING


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_codebook_properties(index_bits: int) -> None:
    quadrant, codebook = load_entries(index_bits, PLAIN), load_codebook(index_bits)
    assert (quadrant > 0).all()
    assert torch.equal(quadrant.bfloat16().float(), quadrant)
    assert torch.equal(quadrant.half().float(), quadrant)
    assert len(codebook.unique(dim=0)) == 2**index_bits
    assert sorted(quadrant.tolist()) == quadrant.tolist()
    m = len(quadrant) // 3
    assert torch.equal(codebook[m + 3 * len(quadrant)], -quadrant[m])


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_signs_are_where_the_format_has_them(index_bits: int) -> None:
    """Row m + (x < 0) * 2**(b - 2) + (y < 0) * 2**(b - 1), for m the row of the quadrant."""
    quadrant = load_entries(index_bits, PLAIN)
    codebook = flip_signs(quadrant)
    rows = torch.arange(2**index_bits)
    negative = torch.stack((rows >> (index_bits - 2) & 1, rows >> (index_bits - 1)), 1)
    assert torch.equal(codebook, quadrant[rows % len(quadrant)] * (1 - 2 * negative))
    assert torch.equal(codebook, load_codebook(index_bits))


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_codebook_distortion_by_an_independent_computation(index_bits: int) -> None:
    """Monte Carlo with SciPy's k-d tree and NumPy's generator: no line in common with the fit."""
    points = np.random.default_rng(7).standard_normal((2_000_000, 2))
    tree = cKDTree(load_codebook(index_bits).double().numpy())
    distance, _ = tree.query(points, workers=-1)
    nmse = float((distance**2).mean() / 2)
    # The high-rate limit of any 2D quantizer is 2.0157 / C.
    assert 0.95 * 2.0157 / 2**index_bits < nmse <= NMSE_CEILING[index_bits]


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_codebook_of_the_trellis(index_bits: int) -> None:
    """Twice as many codewords as indices, all different, whose classes lie between each other."""
    entries, codebook = load_entries(index_bits, TRELLIS), load_codebook(index_bits, TRELLIS)
    assert torch.equal(entries.bfloat16().float(), entries)
    assert torch.equal(entries.half().float(), entries)
    assert len(codebook.unique(dim=0)) == 2 ** (index_bits + 1)
    assert sorted(entries.tolist()) == entries.tolist()
    classes = codebook.view(4, -1, 2)
    assert torch.equal(
        classes, entries * torch.tensor([[1, 1], [-1, 1], [1, -1], [-1, -1]])[:, None]
    )
    near = entries[entries.norm(dim=1) < 1]
    own = torch.cdist(near, entries).topk(2, largest=False).values[:, 1]
    assert (torch.cdist(near, codebook).topk(2, largest=False).values[:, 1] < 0.75 * own).all()
