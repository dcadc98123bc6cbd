"""The beam: it finds the best coding where that can be tried out, and never a worse one."""

import itertools

import pytest
import torch

from offline_quantize.encoding import beam
from offline_quantize.encoding.beam import Book, book_of, encode_with_beam, sweep
from offline_quantize.encoding.feedback import (
    encode_with_feedback,
    factor,
    feedback_matrix,
    pair_blocks,
)

CPU = torch.device("cpu")


def correlated(num_inputs: int, seed: int = 0) -> torch.Tensor:
    """A root R [K, K] float64 of inputs that are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * num_inputs, num_inputs, generator=generator).double()
    inputs = inputs @ torch.randn(num_inputs, num_inputs, generator=generator).double()
    return factor(inputs.T @ inputs / len(inputs), damping=0.01)


def metric_of(root: torch.Tensor) -> torch.Tensor:
    diagonal = pair_blocks(root)
    return (diagonal @ diagonal.mT).float()


def error_of(
    coordinates: torch.Tensor, indices: torch.Tensor, root: torch.Tensor, book: Book
) -> torch.Tensor:
    """(u - q) R R^T (u - q)^T of every row [N]."""
    coded = book.codewords[indices.int()].view(coordinates.shape)
    return ((coordinates - coded).double() @ root).square().sum(1)


def whole_book(index_bits: int) -> Book:
    """A codebook in which all codewords are neighbors."""
    codewords = book_of(index_bits, CPU).codewords
    neighbors = torch.arange(len(codewords))[:, None].expand(-1, len(codewords))
    return Book(index_bits, codewords, neighbors)


def test_a_wide_beam_finds_the_best_coding(monkeypatch: pytest.MonkeyPatch) -> None:
    root, book = correlated(4), whole_book(6)
    coordinates = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(beam, "CANDIDATES", 64)
    monkeypatch.setattr(beam, "WIDTH", 64)
    found = encode_with_beam(coordinates, feedback_matrix(root), metric_of(root), book)
    every = torch.tensor(list(itertools.product(range(64), repeat=2)), dtype=torch.int16)
    for row, chosen in zip(coordinates, found, strict=True):
        errors = error_of(row.expand(len(every), -1), every, root, book)
        assert torch.equal(every[errors.argmin()], chosen)


def test_a_beam_of_one_is_plain_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    root = correlated(192)
    coordinates = torch.randn(40, 192, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(beam, "CANDIDATES", 1)
    monkeypatch.setattr(beam, "WIDTH", 1)
    codewords = book_of(8, CPU).codewords
    alone = Book(8, codewords, torch.arange(len(codewords))[None])
    feedback = feedback_matrix(root)
    found = encode_with_beam(coordinates, feedback, metric_of(root), alone)
    plain = encode_with_feedback(coordinates, feedback, 8)
    # Sums in another order move a few targets into another codeword, and then those that follow.
    assert (found == plain).float().mean() > 0.95


@pytest.mark.parametrize("num_inputs", [64, 320])
def test_every_step_lessens_the_error(num_inputs: int) -> None:
    root, book = correlated(num_inputs), book_of(9, CPU)
    coordinates = torch.randn(64, num_inputs, generator=torch.Generator().manual_seed(3))
    feedback = feedback_matrix(root)
    plain = encode_with_feedback(coordinates, feedback, 9)
    found = encode_with_beam(coordinates, feedback, metric_of(root), book)
    before = error_of(coordinates, found, root, book)
    assert before.sum() < 0.97 * error_of(coordinates, plain, root, book).sum()
    sweep(coordinates, (root @ root.T).float(), found, book)
    after = error_of(coordinates, found, root, book)
    assert after.sum() < before.sum()
    assert (after <= before * (1 + 1e-4)).all()


def test_neighbors_begin_with_the_codeword_itself() -> None:
    book = book_of(7, CPU)
    assert torch.equal(book.neighbors[0], torch.arange(128))
    distance = (book.codewords[book.neighbors] - book.codewords).norm(dim=2)
    assert (distance.diff(dim=0) >= 0).all()
