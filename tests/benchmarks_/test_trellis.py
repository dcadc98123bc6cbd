"""Trellis codes: encoders against exhaustive search, decoders, and the committed figures."""

from itertools import product

import pytest
import torch

from benchmarks.study import output_errors, report, trellis_scalar
from benchmarks.study.trellis import (
    EIGHT,
    FLIPS,
    SIXTY_FOUR,
    Trellis,
    codes,
    decode,
    encode,
    gaussian_rows,
    sqnr,
)
from benchmarks.study.trellis_scalar import Window
from qamw_kernels.codec.nearest import Grid, grid
from qamw_kernels.codec.trellis import PATH_ORDER, best_paths
from qamw_kernels.format.codebook import TRELLIS

SMALL = Trellis(4, (7, 5))


@pytest.fixture(scope="module")
def book() -> Grid:
    return grid(6, TRELLIS, torch.device("cpu"))


@pytest.mark.parametrize("trellis", [SMALL, EIGHT, SIXTY_FOUR])
def test_encoder_finds_the_best_path(book: Grid, trellis: Trellis) -> None:
    rows = gaussian_rows(8 * 7, 7, seed=2)
    pairs = rows.unflatten(1, (-1, 2))
    everything = FLIPS[:, None] * book.entries  # [4, 2^(b-1), 2]
    costs = (pairs[:, :, None, None] - everything).square().sum(-1).amin(-1)  # [N, P, 4]
    paths = torch.tensor(list(product((0, 1), repeat=7)), dtype=torch.int16) << 5
    signs = (decode(paths, book, trellis) * book.entries[0].repeat(7)).unflatten(1, (-1, 2)) < 0
    classes = signs[..., 0] + 2 * signs[..., 1].int()  # [paths, P]: all have the entry 0
    best = costs[:, torch.arange(7), classes].sum(-1).amin(1)
    decoded = decode(encode(rows, book, trellis), book, trellis)
    assert (decoded - rows).square().sum(1).tolist() == pytest.approx(best.tolist(), rel=1e-4)


def test_register_of_known_bits(book: Grid) -> None:
    """Generators 7 and 5 of the register 1, 3, 6, 5: parities 1 0 0 0 and 1 1 1 0."""
    bits = torch.tensor([[1, 1, 0, 1]], dtype=torch.int16) << 5
    x, y = book.entries[0].tolist()
    expected = [-x, -y, x, -y, x, -y, x, y]
    assert decode(bits, book, SMALL).flatten().tolist() == expected


def test_codewords_are_coded_as_themselves(book: Grid) -> None:
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


def test_eight_states_are_those_of_the_codec(book: Grid) -> None:
    """But for the order in which a path visits the pairs of a word."""
    rows = gaussian_rows(16 * 32, 32, seed=6)
    order = list(PATH_ORDER)
    in_order = rows.unflatten(1, (-1, 2))[:, order].flatten(1)
    assert torch.equal(encode(in_order, book, EIGHT), best_paths(rows, book)[:, order])


def test_output_errors_of_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(192, 128, generator=generator) for _ in range(2)]
    inputs = torch.randn(256, 128, generator=generator) * torch.linspace(0.2, 3, 128)
    errors = dict(output_errors.output_errors(weights, inputs.T @ inputs, 64))
    ours = ["plain, feedback", "plain, beam", "trellis, feedback", "trellis, beam"]
    assert list(errors) == [*ours, "scalar trellis, feedback"]
    assert 0 < errors["scalar trellis, feedback"] < errors["plain, feedback"]
    assert errors["plain, beam"] < errors["plain, feedback"]
    assert errors["trellis, beam"] < errors["trellis, feedback"] < errors["plain, feedback"]
