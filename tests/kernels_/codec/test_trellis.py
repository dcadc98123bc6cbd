"""The trellis: what its indices stand for, and that its encoder finds the best path."""

import pytest
import torch

from qamw_kernels.codec.decode import decode_indices
from qamw_kernels.codec.encode import code_coordinates
from qamw_kernels.codec.trellis import PATH_ORDER, codebook_rows, encode, path_inputs
from qamw_kernels.format.codebook import INDEX_BITS, PLAIN, TRELLIS, load_codebook, load_entries
from qamw_kernels.format.packing import UNIT_PAIRS


def random_indices(num_rows: int, num_pairs: int, index_bits: int) -> torch.Tensor:
    return torch.randint(0, 2**index_bits, (num_rows, num_pairs), dtype=torch.int16)


def signs_along(bits: list[int]) -> list[tuple[int, int]]:
    """Signs of x and y along a path, from its bits, one after the other."""
    one = two = three = 0
    signs = []
    for bit in bits:
        x, y = bit ^ one ^ two ^ three, bit ^ two ^ three
        signs.append((1 - 2 * x, 1 - 2 * y))
        one, two, three = bit, one, two
    return signs


def test_the_path_visits_every_pair() -> None:
    assert sorted(PATH_ORDER) == list(range(UNIT_PAIRS))
    assert PATH_ORDER[:10] == (0, 2, 16, 18, 1, 3, 17, 19, 4, 6)
    assert path_inputs(128)[64:72].tolist() == [64, 65, 68, 69, 96, 97, 100, 101]


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_indices_mean_what_the_format_says(index_bits: int) -> None:
    """Written again, one pair after the other; units do not depend on each other."""
    indices = random_indices(3, 96, index_bits)
    entries, size = load_entries(index_bits, TRELLIS), 2 ** (index_bits - 1)
    expected = torch.empty(3, 96, 2)
    for row in range(3):
        for unit in range(0, 96, UNIT_PAIRS):
            pairs = [unit + p for p in PATH_ORDER]
            bits = [int(indices[row, p]) >> (index_bits - 1) for p in pairs]
            for p, signs in zip(pairs, signs_along(bits), strict=True):
                entry = entries[int(indices[row, p]) % size]
                expected[row, p] = entry * torch.tensor(signs)
    assert torch.equal(decode_indices(indices, index_bits, TRELLIS), expected.flatten(1))
    rows = codebook_rows(indices, index_bits)
    assert torch.equal(load_codebook(index_bits, TRELLIS)[rows.int()], expected)


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_codewords_along_a_path_encode_to_themselves(index_bits: int) -> None:
    indices = random_indices(50, 64, index_bits)
    coordinates = decode_indices(indices, index_bits, TRELLIS)
    assert torch.equal(encode(coordinates, index_bits), indices)


def test_no_other_path_is_better() -> None:
    """Paths that differ in some bits, each with the entries that are best along it."""
    index_bits, generator = 7, torch.Generator().manual_seed(0)
    unit = torch.randn(1, 64, generator=generator)
    best = encode(unit, index_bits)
    least = float((decode_indices(best, index_bits, TRELLIS) - unit).square().sum())
    entries = load_entries(index_bits, TRELLIS)
    chosen = [int(best[0, p]) >> (index_bits - 1) for p in PATH_ORDER]
    points = unit.view(UNIT_PAIRS, 2)[list(PATH_ORDER)]
    for _ in range(300):
        flips = torch.rand(UNIT_PAIRS, generator=generator) < 0.1
        bits = [bit ^ int(flip) for bit, flip in zip(chosen, flips, strict=True)]
        targets = points * torch.tensor(signs_along(bits))
        errors = (targets[:, None] - entries).square().sum(2).amin(1)
        assert float(errors.sum()) >= least * (1 - 1e-6)


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_gain_over_the_plain_code(index_bits: int) -> None:
    """More than a decibel: 0.79 of the squared error."""
    coordinates = torch.randn(500, 128, generator=torch.Generator().manual_seed(1))
    errors = [
        float((code_coordinates(coordinates, index_bits, code) - coordinates).square().mean())
        for code in (TRELLIS, PLAIN)
    ]
    assert errors[0] < 0.79 * errors[1]
