"""Error feedback that follows several codings of a row at once, a beam, and keeps the best.

The codeword nearest to a target is not always the best one: another may leave errors that later
pairs make up for more easily. So WIDTH codings of a part of the inputs, the *survivors*, are
followed at once. The next pair extends each of them in CANDIDATES ways, by the codeword nearest to
its target and by those next to that one; of all these, the WIDTH with the least error survive.
Then every pair is coded again, in order, with all other pairs fixed (:func:`sweep`).

The error that is minimized, and the notation, are those of :mod:`.feedback`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from offline_quantize.encoding.feedback import LAZY_INPUTS, feedback_matrix, pair_blocks
from qamw_kernels.codec.nearest import nearest
from qamw_kernels.format.codebook import load_codebook

WIDTH = 8
CANDIDATES = 3
SWEEPS = 2
BEAM_INPUTS = 16  # coded before the targets of the part's later inputs are updated
BEAM_ROWS = 1024  # coded at once: the survivors stay in cache


class Book(NamedTuple):
    """A codebook on a device.

    Attributes:
        codewords: [C, 2] float32.
        neighbors: [CANDIDATES, C] int64: of every codeword, itself and those nearest to it.
    """

    index_bits: int
    codewords: torch.Tensor
    neighbors: torch.Tensor


@functools.lru_cache(maxsize=16)
def book_of(index_bits: int, device: torch.device) -> Book:
    """The codebook with its neighbors; cached, treat it as read-only."""
    codewords = load_codebook(index_bits)
    exact = codewords.double()
    neighbors = [
        torch.cdist(exact, part).sort(dim=0, stable=True).indices[:CANDIDATES]
        for part in torch.split(exact, 256)
    ]
    return Book(index_bits, codewords.to(device), torch.cat(neighbors, 1).to(device))


def beam_coder(root: torch.Tensor, index_bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that codes coordinates [n, K] float32 as indices [n, P] int16.

    Args:
        root: R [K, K] float64, of :func:`.feedback.factor`.
    """
    book, feedback = book_of(index_bits, root.device), feedback_matrix(root)
    hessian = (root @ root.T).float()
    diagonal = pair_blocks(root)
    metric = (diagonal @ diagonal.mT).float()

    def code(coordinates: torch.Tensor) -> torch.Tensor:
        coded = []
        for rows in torch.split(coordinates, BEAM_ROWS):
            indices = encode_with_beam(rows, feedback, metric, book)
            for _ in range(SWEEPS):
                sweep(rows, hessian, indices, book)
            coded.append(indices)
        return torch.cat(coded)

    return code


def encode_with_beam(
    coordinates: torch.Tensor, feedback: torch.Tensor, metric: torch.Tensor, book: Book
) -> torch.Tensor:
    """Code coordinates with error feedback, in several ways at once.

    Args:
        coordinates: [N, K] float32.
        feedback: [K, K] float32, of :func:`.feedback.feedback_matrix`.
        metric: [P, 2, 2] float32: R[p, p] R[p, p]^T, the quadratic form of a pair's error.
    Returns:
        indices [N, P] int16.
    """
    wanted = coordinates.T.contiguous()  # [K, N]: a pair is two contiguous rows
    errors = torch.empty_like(wanted)  # u - q
    indices = []
    for start in range(0, len(wanted), LAZY_INPUTS):
        part = slice(start, start + LAZY_INPUTS)
        targets = torch.addmm(wanted[part], feedback[:start, part].T, errors[:start])
        chosen, errors[part] = _code_part(
            wanted[part],
            targets,
            feedback[part, part],
            metric[part.start // 2 : part.stop // 2],
            book,
        )
        indices.append(chosen)
    return torch.cat(indices).to(torch.int16).T.contiguous()


def _code_part(
    wanted: torch.Tensor,
    targets: torch.Tensor,
    feedback: torch.Tensor,
    metric: torch.Tensor,
    book: Book,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best coding of some inputs [n, N]: indices [n / 2, N] and errors [n, N].

    Every row has S survivors, each with targets of its own.
    """
    targets = targets[:, None]  # [n, S, N]
    cost = torch.zeros_like(targets[0])  # [S, N]
    indices = torch.empty(0, *cost.shape, dtype=torch.int64, device=wanted.device)  # [coded, S, N]
    errors = torch.empty(0, *cost.shape, device=wanted.device)  # [coded, S, N]
    for start in range(0, len(wanted), BEAM_INPUTS):
        stop = min(start + BEAM_INPUTS, len(wanted))
        block, rest = slice(start, stop), slice(stop, None)
        cost, parents, new_indices, new_errors = _code_block(
            wanted[block],
            targets[: stop - start],
            cost,
            feedback[block, block],
            metric[start // 2 : stop // 2],
            book,
        )
        indices = torch.cat((_of(indices, parents), new_indices))
        errors = torch.cat((_of(errors, parents), new_errors))
        targets = _of(targets[stop - start :], parents)
        _add_feedback(targets, feedback[block, rest], new_errors)
    best = cost.argmin(0, keepdim=True)  # [1, N]
    return _of(indices, best)[:, 0], _of(errors, best)[:, 0]


def _code_block(
    wanted: torch.Tensor,
    targets: torch.Tensor,
    cost: torch.Tensor,
    feedback: torch.Tensor,
    metric: torch.Tensor,
    book: Book,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow the survivors through a few inputs [n, N].

    Returns:
        For the new survivors: the cost [S', N], the old survivor that each descends from [S', N],
        and the indices [n / 2, S', N] and errors [n, S', N] of these inputs.
    """
    num_old, num_rows = cost.shape
    parents = torch.arange(num_old, device=cost.device)[:, None].expand(num_old, num_rows)
    indices = torch.empty(0, num_old, num_rows, dtype=torch.int64, device=cost.device)
    errors = torch.empty(0, num_old, num_rows, device=cost.device)
    for i in range(0, len(wanted), 2):
        cost, at, chosen = _branch(targets[:2], cost, metric[i // 2], book)
        new_errors = wanted[i : i + 2, None] - book.codewords[chosen].movedim(2, 0)
        parents = parents.gather(0, at)
        indices = torch.cat((_of(indices, at), chosen[None]))
        errors = torch.cat((_of(errors, at), new_errors))
        targets = _of(targets[2:], at)
        _add_feedback(targets, feedback[i : i + 2, i + 2 :], new_errors)
    return cost, parents, indices, errors


def _branch(
    target: torch.Tensor, cost: torch.Tensor, metric: torch.Tensor, book: Book
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best codings of one more pair.

    Args:
        target: [2, S, N]. cost: [S, N]. metric: [2, 2].
    Returns:
        The cost, the survivor that is extended, and the pair's index: [S', N] each, S' up to WIDTH.
    """
    num_old, num_rows = cost.shape
    closest = nearest(target.reshape(2, -1).T, book.index_bits).view(num_old, num_rows)
    candidates = book.neighbors[:, closest.int()]  # [CANDIDATES, S, N]
    x = target[0] - book.codewords[:, 0][candidates]
    y = target[1] - book.codewords[:, 1][candidates]
    added = metric[0, 0] * x * x + 2 * metric[0, 1] * x * y + metric[1, 1] * y * y
    costs = (cost + added).view(-1, num_rows)
    cost, at = costs.topk(min(WIDTH, len(costs)), dim=0, largest=False)
    return cost, at % num_old, candidates.view(-1, num_rows).gather(0, at)


def _of(values: torch.Tensor, survivors: torch.Tensor) -> torch.Tensor:
    """The values [n, S', N] of some survivors [S', N], out of values [n, S, N] of all."""
    return values.gather(1, survivors.expand(len(values), *survivors.shape))


def _add_feedback(targets: torch.Tensor, feedback: torch.Tensor, errors: torch.Tensor) -> None:
    """Change targets [n, S, N] in place to make up for errors [m, S, N], by feedback [m, n]."""
    if len(targets):
        targets.view(len(targets), -1).addmm_(feedback.T, errors.reshape(len(errors), -1))


def sweep(
    coordinates: torch.Tensor, hessian: torch.Tensor, indices: torch.Tensor, book: Book
) -> None:
    """Code every pair again with all other pairs fixed; keep the new index if the error is less.

    Args:
        coordinates: [N, K] float32.
        hessian: [K, K] float32, R R^T.
        indices: [N, P] int16; changed in place.
    """
    codewords = book.codewords[indices.int()].view(coordinates.shape).T.contiguous()  # [K, N]
    errors = coordinates.T - codewords
    blocks = pair_blocks(hessian)
    inverse = torch.linalg.inv(blocks)
    for start in range(0, len(errors), LAZY_INPUTS):
        part = slice(start, start + LAZY_INPUTS)
        gradient, local = hessian[part] @ errors, hessian[part, part]
        for i in range(0, len(gradient), 2):
            at = slice(start + i, start + i + 2)
            p = at.start // 2
            step = inverse[p] @ gradient[i : i + 2]  # from the codeword to the best point
            chosen = nearest((codewords[at] + step).T, book.index_bits)
            moved = book.codewords[chosen.int()].T - codewords[at]
            gain = _squared(step, blocks[p]) - _squared(step - moved, blocks[p])
            moved *= gain > 0
            indices[:, p] = torch.where(gain > 0, chosen, indices[:, p])
            codewords[at] += moved
            errors[at] -= moved
            gradient.addmm_(local[:, i : i + 2], moved, alpha=-1)


def _squared(vectors: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """v^T M v [N] of vectors [2, N]."""
    return (vectors * (metric @ vectors)).sum(0)
