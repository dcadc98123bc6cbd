"""Trellis codes: encoders against exhaustive search, decoders, and the committed figures."""

from itertools import product

import pytest
import torch

from benchmarks.study import output_errors, report, trellis_scalar
from benchmarks.study.trellis import (
    EIGHT,
    FLIPS,
    REACH,
    SIXTY_FOUR,
    Book,
    Trellis,
    codes,
    decode,
    encode,
    gaussian_rows,
    lattice,
    pair_classes,
    sqnr,
)
from benchmarks.study.trellis_feedback import trellis_coder
from benchmarks.study.trellis_scalar import Window
from offline_quantize.encoding.feedback import factor

SMALL = Trellis(4, (7, 5))


@pytest.fixture(scope="module")
def book() -> Book:
    return Book.of(lattice(6))


@pytest.mark.parametrize("index_bits", [6, 9, 12])
def test_nearest_is_exact(index_bits: int) -> None:
    book = Book.of(lattice(index_bits))
    points = torch.rand(1 << 12, 2, generator=torch.Generator().manual_seed(1))
    points = (points * 2 - 1) * REACH
    expected = torch.cdist(points.double(), book.codewords.double()).min(1).values
    entries = book.nearest(*points.T).int()
    found = (points - book.codewords[entries]).double().norm(dim=1)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_classes_are_cosets_of_one_lattice(book: Book) -> None:
    """All 2^(b+1) codewords differ, and a quarter of the entries lies in every quadrant."""
    everything = (FLIPS[:, None] * book.codewords).flatten(0, 1)
    assert len(torch.unique(everything, dim=0)) == 1 << 7
    signs, counts = torch.unique(book.codewords.sign(), dim=0, return_counts=True)
    assert len(signs) == 4
    assert counts.tolist() == [8] * 4


@pytest.mark.parametrize("trellis", [SMALL, EIGHT, SIXTY_FOUR])
def test_encoder_finds_the_best_path(book: Book, trellis: Trellis) -> None:
    rows = gaussian_rows(8 * 7, 7, seed=2)
    pairs = rows.unflatten(1, (-1, 2))
    everything = FLIPS[:, None] * book.codewords  # [4, 2^(b-1), 2]
    costs = (pairs[:, :, None, None] - everything).square().sum(-1).amin(-1)  # [N, P, 4]
    paths = torch.tensor(list(product((0, 1), repeat=7)), dtype=torch.int16) << 5
    classes = pair_classes(paths, 6, trellis)  # [paths, P]
    best = costs[:, torch.arange(7), classes].sum(-1).amin(1)
    decoded = decode(encode(rows, book, trellis), book, trellis)
    assert (decoded - rows).square().sum(1).tolist() == pytest.approx(best.tolist(), rel=1e-4)


def test_register_of_known_bits() -> None:
    """Generators 7 and 5 of the register 1, 3, 6, 5: parities 1 0 0 0 and 1 1 1 0."""
    bits = torch.tensor([[1, 1, 0, 1]], dtype=torch.int16) << 5
    assert pair_classes(bits, 6, SMALL).tolist() == [[1 + 2, 2, 2, 0]]


def test_codewords_are_coded_as_themselves(book: Book) -> None:
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(64, (16, 32), generator=generator).to(torch.int16)
    rows = decode(indices, book, EIGHT)
    assert torch.equal(encode(rows, book, EIGHT), indices)


@pytest.mark.parametrize("index_bits", [4, 5])
def test_scalar_encoder_finds_the_best_path(index_bits: int) -> None:
    window = Window.of(8, index_bits)
    rows = gaussian_rows(9 * 2, 2, seed=4)
    shifts = [window.shift(i) for i in range(4)]
    assert sum(shifts) == 2 * index_bits
    paths = torch.tensor(list(product(*(range(1 << shift) for shift in shifts))))
    everything = trellis_scalar.decode(paths, window)
    best = (rows[:, None] - everything).square().sum(-1).amin(1)
    decoded = trellis_scalar.decode(trellis_scalar.encode(rows, window), window)
    assert (decoded - rows).square().sum(1).tolist() == pytest.approx(best.tolist(), rel=1e-4)


def test_committed_figures_come_out_again() -> None:
    committed = {(row["code"], row["index_bits"]): row for row in report.load_codes()}
    names = set()
    for name, code, length, num_pairs in codes(7):
        names.add(name)
        ratio, error = sqnr(code, length, min(num_pairs, 1 << 13 if "16" not in name else 512))
        row = committed[name, 7]
        assert ratio == pytest.approx(row["sqnr_db"], abs=4 * (error + row["sqnr_db_se"])), name
    assert {name for name, _ in committed} == names


def random_root(size: int) -> torch.Tensor:
    """R [K, K] float64 of strongly correlated inputs."""
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(5)).double()
    return factor((x + 2 * x[:, :1]).T @ (x + 2 * x[:, :1]), damping=0.1)


@pytest.mark.parametrize("continuing", [False, True])
def test_without_correlations_words_are_coded_by_themselves(book: Book, continuing: bool) -> None:
    rows = gaussian_rows(16 * 64, 64, seed=6)
    coded = trellis_coder(torch.eye(128).double(), book, EIGHT, continuing)(rows)
    words = decode(encode(rows.reshape(-1, 64), book, EIGHT), book, EIGHT).view(rows.shape)
    torch.testing.assert_close(coded[:, :64], words[:, :64])
    same = torch.isclose(coded[:, 64:], words[:, 64:]).all()
    assert bool(same) is not continuing
    assert (coded - rows).square().mean() < 1.1 * (words - rows).square().mean()


def follow(row: torch.Tensor, root: torch.Tensor, book: Book, trellis: Trellis) -> torch.Tensor:
    """Reference of trellis_coder for one row [K] within one word: its codewords."""
    classes = trellis.classes().tolist()
    survivors = {0: (0.0, torch.zeros(0, dtype=torch.float64))}  # state -> cost, errors
    for i in range(0, len(row), 2):
        block = root[i : i + 2, i : i + 2]
        reached = []
        for state, (cost, errors) in survivors.items():
            # what errors before cost in this pair's outputs, as a shift of its target
            target = row[i : i + 2] + errors @ root[:i, i : i + 2] @ torch.linalg.inv(block)
            for register in (2 * state, 2 * state + 1):
                codewords = (book.codewords * FLIPS[classes[register]]).double()
                best = codewords[(codewords - target).square().sum(1).argmin()]
                total = cost + float(((target - best) @ block).square().sum())
                own = torch.cat((errors, row[i : i + 2] - best))
                reached.append((register % trellis.states, total, own))
        reached.sort(key=lambda path: -path[1])
        survivors = {state: (cost, errors) for state, cost, errors in reached}
    return row - min(survivors.values(), key=lambda path: path[0])[1]


@pytest.mark.parametrize("trellis", [SMALL, EIGHT])
def test_each_state_has_feedback_of_its_own(book: Book, trellis: Trellis) -> None:
    root, rows = random_root(24), gaussian_rows(16 * 12, 12, seed=7)
    coded = trellis_coder(root, book, trellis)(rows)
    expected = torch.stack([follow(row.double(), root, book, trellis) for row in rows])
    torch.testing.assert_close(coded.double(), expected, rtol=0, atol=1e-5)


def test_feedback_makes_the_error_less(book: Book) -> None:
    root, rows = random_root(192), gaussian_rows(64 * 96, 96, seed=8)
    plain = decode(encode(rows.reshape(-1, 64), book, EIGHT), book, EIGHT).view(rows.shape)
    ours, theirs = (
        float(((coded - rows).double() @ root).square().sum())
        for coded in (trellis_coder(root, book, EIGHT)(rows), plain)
    )
    assert ours < 0.7 * theirs


def test_output_errors_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows several codings at once leaves less error than plain feedback."""
    monkeypatch.setattr(output_errors, "fitted_book", lambda bits: Book.of(lattice(bits)))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(160, 128, generator=generator) for _ in range(2)]
    inputs = torch.randn(256, 128, generator=generator) * torch.linspace(0.2, 3, 128)
    errors = dict(output_errors.output_errors(weights, inputs.T @ inputs, 64))
    assert errors.pop("feedback") > max(errors.values())
    assert list(errors) == ["beam", "trellis, words start at 0", "trellis, words go on"]
