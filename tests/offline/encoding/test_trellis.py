"""Error feedback along paths, against a slow reference and the codec's encoder without feedback."""

import itertools
from collections.abc import Callable

import pytest
import torch

from offline_quantize.encoding.feedback import factor, feedback_coder
from offline_quantize.encoding.group import Coder
from offline_quantize.encoding.trellis import (
    CELLS,
    REACH,
    book_of,
    sweeping_coder,
    trellis_coder,
    unpacked,
)
from qamw_kernels.codec import trellis
from qamw_kernels.codec.decode import decode_indices
from qamw_kernels.codec.trellis import GENERATORS, path_inputs
from qamw_kernels.format.codebook import PLAIN, TRELLIS, load_entries
from tests.helpers.hessians import correlated_hessian, output_error


def random_rows(num_rows: int, num_inputs: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(seed))


def root_of(hessian: torch.Tensor) -> torch.Tensor:
    """R [K, K] in the order of paths."""
    order = path_inputs(len(hessian))
    return factor(hessian[order][:, order], 0.0)


def output_errors(
    rows: torch.Tensor, indices: torch.Tensor, index_bits: int, hessian: torch.Tensor
) -> torch.Tensor:
    """(u - q) H (u - q)^T [N] float64 of indices of the trellis."""
    difference = (rows - decode_indices(indices, index_bits, TRELLIS)).double()
    return ((difference @ hessian) * difference).sum(1)


def classes_of(index_bits: int) -> torch.Tensor:
    """Codewords [16, E, 2] float64 of every value of a register."""
    signs = [[1 - 2 * ((r & g).bit_count() & 1) for g in GENERATORS] for r in range(16)]
    entries = load_entries(index_bits, TRELLIS).double()
    return torch.tensor(signs)[:, None] * entries


def follow(row: torch.Tensor, root: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Reference of trellis_coder for one row [K] in the order of paths: its codewords."""
    codewords, side = classes_of(index_bits), 2 * REACH / CELLS
    fixed = torch.zeros(0, dtype=torch.float64)
    for start in range(0, len(row), 64):
        survivors = {0: (0.0, fixed)}  # state -> cost, errors
        for i in range(start, start + 64, 2):
            block = root[i : i + 2, i : i + 2]
            reached = []
            for state, (cost, errors) in survivors.items():
                # what errors before cost in this pair's outputs, as a shift of its target
                target = row[i : i + 2] + errors @ root[:i, i : i + 2] @ torch.linalg.inv(block)
                center = ((target / side).floor() + 0.5).clamp(
                    (1 - CELLS) / 2, (CELLS - 1) / 2
                ) * side
                for register in (2 * state, 2 * state + 1):
                    found = (codewords[register] - center).square().sum(1).argmin()
                    best = codewords[register, found]
                    total = cost + float(((target - best) @ block).square().sum())
                    own = torch.cat((errors, row[i : i + 2] - best))
                    reached.append((register % 8, total, own))
            reached.sort(key=lambda path: -path[1])
            survivors = {state: (cost, errors) for state, cost, errors in reached}
        fixed = min(survivors.values(), key=lambda path: path[0])[1]
    return row - fixed


@pytest.mark.parametrize("index_bits", [6, 9])
def test_every_state_has_feedback_of_its_own(index_bits: int) -> None:
    hessian, rows = correlated_hessian(128, 500), random_rows(8, 128, 1)
    root, order = root_of(hessian), path_inputs(128)
    indices = trellis_coder(root, index_bits)(rows)
    assert indices.shape == (8, 64)
    assert indices.dtype == torch.int16
    found = decode_indices(indices, index_bits, TRELLIS)[:, order].double()
    expected = torch.stack([follow(row, root, index_bits) for row in rows[:, order].double()])
    # Rounding may change one choice, and with it those after it: rows must be equal, or as good.
    same = (found == expected).all(1)
    assert same.float().mean() >= 0.75
    energies = [((q - rows[:, order]) @ root).square().sum(1) for q in (found, expected)]
    torch.testing.assert_close(*energies, rtol=0.25, atol=0)


@pytest.mark.parametrize("index_bits", [6, 11])
def test_without_correlations_paths_are_those_of_the_codec(index_bits: int) -> None:
    rows = random_rows(64, 192, 2)
    coded = trellis_coder(torch.eye(192).double(), index_bits)(rows)
    expected = trellis.encode(rows, index_bits)
    errors = [
        output_errors(rows, x, index_bits, torch.eye(192).double()) for x in (coded, expected)
    ]
    assert (errors[0] >= errors[1] * (1 - 1e-5)).all()
    assert errors[0].sum() < 1.003 * errors[1].sum()
    assert (coded == expected).float().mean() > 0.9


@pytest.mark.parametrize("index_bits", [6, 12])
def test_cells_lose_next_to_nothing(index_bits: int) -> None:
    book, entries = book_of(index_bits, torch.device("cpu")), load_entries(index_bits, TRELLIS)
    points = random_rows(1 << 12, 2, 3)
    column, row = ((points + REACH) * (CELLS / (2 * REACH))).long().T
    found = torch.stack(unpacked(book.cells[column * CELLS + row]), 1)
    exact = torch.cdist(points.double(), entries.double()).amin(1).square()
    assert (points - found).square().sum(1).mean() < 1.012 * exact.mean()


@pytest.mark.parametrize("index_bits", [7, 11])
def test_feedback_along_paths_leaves_a_fifth_less(index_bits: int) -> None:
    hessian, rows = correlated_hessian(192, 2000), random_rows(64, 192, 4)
    plain = feedback_coder(factor(hessian, 0.0), index_bits)(rows)
    theirs = output_error(rows - decode_indices(plain, index_bits, PLAIN), hessian)
    coded = trellis_coder(root_of(hessian), index_bits)(rows)
    ours = output_errors(rows, coded, index_bits, hessian)
    assert ours.sum() < 0.81 * theirs


def test_no_sweep_makes_a_row_worse() -> None:
    hessian, rows = correlated_hessian(192, 1000), random_rows(32, 192, 5)
    errors = [
        output_errors(rows, trellis_coder(root_of(hessian), 8, sweeps)(rows), 8, hessian)
        for sweeps in range(3)
    ]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < before.sum()
    assert errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("make_coder", [trellis_coder, sweeping_coder])
def test_rows_are_coded_by_themselves(
    make_coder: Callable[..., Coder], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, rows = root_of(correlated_hessian(128, 500)), random_rows(13, 128, 6)
    together = make_coder(root, 10)(rows)
    monkeypatch.setattr("offline_quantize.encoding.trellis.ROWS_AT_ONCE", 5)
    # Matrix products of other shapes may round otherwise.
    assert (make_coder(root, 10)(rows) == together).all(1).float().mean() > 0.75


def test_far_coordinates_are_coded() -> None:
    rows = 40 * random_rows(4, 64, 7)
    rows[0] = 0
    coded = decode_indices(trellis_coder(torch.eye(64).double(), 8)(rows), 8, TRELLIS)
    exact = decode_indices(trellis.encode(rows, 8), 8, TRELLIS)
    errors = [(x - rows).square().sum(1) for x in (coded, exact)]
    assert (errors[0] <= 1.1 * errors[1]).all()
