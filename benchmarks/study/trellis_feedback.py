"""Error feedback for trellis-coded QAM: every state of the trellis has feedback of its own.

In a word, the best path to each state is followed with the errors that it made, so that a pair's
target is its path's own (per-survivor processing). At a word's end the best of them is kept. What
is minimized is that of :mod:`offline_quantize.encoding.feedback`, with the same names.
"""

from collections.abc import Callable

import torch

from benchmarks.study.trellis import FLIPS, WORD_PAIRS, Book, Trellis
from offline_quantize.encoding.feedback import feedback_matrix, pair_blocks

ROWS_AT_ONCE = 512  # the survivors stay in cache


def trellis_coder(
    root: torch.Tensor, book: Book, trellis: Trellis, continuing: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that codes coordinates [n, K] float32 and gives their codewords, [n, K] too.

    Args:
        root: R [K, K] float64, of :func:`offline_quantize.encoding.feedback.factor`.
        continuing: whether a word starts from the state that the word before left, and not from 0.
    """
    feedback, diagonal = feedback_matrix(root), pair_blocks(root)
    metric = (diagonal @ diagonal.mT).float()
    encoder = _Encoder(feedback, metric, book, trellis, continuing)
    return lambda rows: torch.cat([encoder.code(part) for part in rows.split(ROWS_AT_ONCE)])


class _Encoder:
    """What coding some rows needs to know.

    Args:
        feedback: [K, K] float32. metric: [P, 2, 2] float32, by which a pair's error counts.
    """

    def __init__(
        self,
        feedback: torch.Tensor,
        metric: torch.Tensor,
        book: Book,
        trellis: Trellis,
        continuing: bool,
    ) -> None:
        self._feedback, self._metric, self._book = feedback, metric, book
        self._states, self._continuing = trellis.states, continuing
        # of a register r: where it comes from is r >> 1, where it leads to r & (states - 1)
        self._old = torch.arange(2 * trellis.states) >> 1
        self._flips = FLIPS[trellis.classes()].T[..., None]  # [2, 2 S, 1]

    def code(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Codewords [N, K] of coordinates [N, K], word by word."""
        wanted = coordinates.T.contiguous()  # [K, N]
        errors = torch.empty_like(wanted)  # u - q
        state = torch.zeros(wanted.shape[1], dtype=torch.int64)
        for start in range(0, len(wanted), 2 * WORD_PAIRS):
            word = slice(start, start + 2 * WORD_PAIRS)
            targets = torch.addmm(wanted[word], self._feedback[:start, word].T, errors[:start])
            errors[word], end = self._code_word(wanted[word], targets, state, word)
            state = end if self._continuing else state
        return (wanted - errors).T

    def _code_word(
        self, wanted: torch.Tensor, targets: torch.Tensor, state: torch.Tensor, word: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors [n, N] of the best path through a word, and the state [N] that it ends in.

        Args:
            wanted: [n, N]. targets: [n, N], which make up for the words before.
            state: [N], in which the word starts.
        """
        num_inputs, num_rows = wanted.shape
        feedback = self._feedback[word, word]
        metric = self._metric[word.start // 2 : word.stop // 2]
        cost = torch.full((self._states, num_rows), torch.inf).scatter_(0, state[None], 0)
        errors = torch.empty(num_inputs, self._states, num_rows)  # of every survivor
        for i in range(0, num_inputs, 2):
            pair, before = slice(i, i + 2), errors[:i].flatten(1)
            made_up = (feedback[:i, pair].T @ before).view(2, self._states, num_rows)
            target = (targets[pair, None] + made_up)[:, self._old]  # [2, 2 S, N]
            added, codewords = self._nearest(target, metric[i // 2])
            costs = (cost[self._old] + added).view(2, self._states, num_rows)
            second = costs[1] < costs[0]
            cost = torch.minimum(costs[0], costs[1])
            errors[:i] = self._survivors(errors[:i], second)
            first, other = (wanted[pair, None] - codewords).unflatten(1, (2, -1)).unbind(1)
            errors[pair] = torch.where(second, other, first)
        best = cost.argmin(0)
        kept = errors.gather(1, best.expand(num_inputs, 1, num_rows))[:, 0]
        return kept, best

    def _nearest(
        self, target: torch.Tensor, metric: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What coding targets [2, 2 S, N] costs [2 S, N], and their codewords [2, 2 S, N]."""
        x, y = target * self._flips  # as if of class 0
        entries = self._book.nearest(x, y)
        near = self._book.codewords.T[:, entries.int()]
        dx, dy = x - near[0], y - near[1]
        # flipped together with the error, the metric's mixed term changes its sign
        mixed = 2 * metric[0, 1] * self._flips[0] * self._flips[1]
        cost = metric[0, 0] * dx * dx + mixed * dx * dy + metric[1, 1] * dy * dy
        return cost, near * self._flips

    def _survivors(self, errors: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Of errors [m, S, N] those of the paths that new states descend from.

        Args:
            second: [S, N], whether a new state s descends from (s + S) >> 1, and not from s >> 1.
        """
        first, other = (half.repeat_interleave(2, 1) for half in errors.chunk(2, 1))
        return torch.where(second, other, first)
