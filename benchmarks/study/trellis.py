"""Trellis-coded QAM: as many bits for every pair, but twice as many codewords.

The 2^(b+1) codewords of b bits are companded points of the half-integer lattice, in four classes:
the parities of both coordinates. A flip of signs maps class 0 onto any other one, so a *book* holds
class 0 alone: [2^(b-1), 2]. Of every pair an entry of the book, b - 1 bits, and a path bit are
stored. The last path bits, those of the pairs before and of the pair itself, are a register; two
parities of it are the class:

    class = (parity of register & generators[0], parity of register & generators[1])
    codeword = book[entry] with its signs flipped by class

A sequence begins with the register 0 and may end with any. The encoder is Viterbi's: of all
paths the one with the least squared error.

``python -m benchmarks.study.trellis`` measures all codes on the unit normal (minutes), and writes
results/trellis.json.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from scipy.spatial import cKDTree

from benchmarks.study import trellis_scalar
from benchmarks.study.report import SQNR_FILE, Row, sqnr_table
from benchmarks.study.trellis_scalar import Window
from qamw_kernels.codec.encode import nearest_codewords

WORD_PAIRS = 32  # a word holds 32 bits of one plane
REACH = 6.5  # points outside [-REACH, REACH)^2 are coded as the nearest point within
FIT_PAIRS, FIT_LENGTH = 1 << 17, 128  # of a round of a fit: pairs, and how many are a sequence
FIT_ROUNDS = 24
FADE = 0.85  # what sums of a fit are worth in the next round
SPREAD = 1.8  # variance of the codewords that a fit begins with
TABLE_BITS = (7, 8, 11, 12)
SEED = 20260101  # of what is measured; fits draw from others
PAIRS = 1 << 16  # measured of codes of pairs
ROW_WORDS = 32  # of a sequence in which words go on
ROWS_AT_ONCE = 2048  # coded at once
SCALAR_PAIRS = {8: 1 << 16, 12: 1 << 17, 16: 1 << 14}  # bits of the window -> pairs measured
SCALAR_LENGTH = 256  # weights of a sequence
FLIPS = torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])
"""[4, 2]: of every class the signs that map class 0 onto it, and it onto class 0."""


class Trellis(NamedTuple):
    """A feed-forward shift register.

    Attributes:
        states: what the path bits before a pair can be: a power of two.
        generators: masks of the register, 0 to 2 * states - 1; the lowest bit is the pair's own.
    """

    states: int
    generators: tuple[int, int]

    def classes(self) -> torch.Tensor:
        """Class [2 * states] int64 of every value of the register."""
        registers = range(2 * self.states)
        x, y = ([(r & mask).bit_count() & 1 for r in registers] for mask in self.generators)
        return torch.tensor(x) + 2 * torch.tensor(y)


EIGHT = Trellis(8, (15, 13))
SIXTY_FOUR = Trellis(64, (91, 103))


class Book(NamedTuple):
    """The codewords of class 0, and which can be the nearest to a point of a cell.

    Attributes:
        index_bits: b.
        codewords: [2^(b-1), 2] float32.
        cells: squares per side of [-REACH, REACH)^2.
        candidates: [L, cells^2] int16, padded by repetition.
        contested: [cells^2] bool, whether there are two or more.
    """

    index_bits: int
    codewords: torch.Tensor
    cells: int
    candidates: torch.Tensor
    contested: torch.Tensor

    @classmethod
    def of(cls, codewords: torch.Tensor) -> "Book":
        """The book of codewords [2^(b-1), 2] float32 of class 0."""
        cells = 8 * math.ceil(len(codewords) ** 0.5)
        side = 2 * REACH / cells
        at = (torch.arange(cells, dtype=torch.float64) + 0.5) * side - REACH
        centers = torch.cartesian_prod(at, at)
        tree, count = cKDTree(codewords.double().numpy()), 4
        while True:
            distances, found = tree.query(centers.numpy(), count)
            # twice half a diagonal, and some for rounding: what is farther wins nowhere in a cell
            if (distances[:, -1] > distances[:, 0] + math.sqrt(2) * side + 1e-4).all():
                break
            count += 2
        candidates = torch.from_numpy(found[:, :-1].T).int()  # [L, cells^2], nearest first
        # Nor does one that the first is nearer than at all corners.
        x, y = (codewords[:, i][candidates] for i in range(2))
        wins = torch.zeros_like(candidates, dtype=torch.bool)
        for corner in (centers.float()[:, :, None] + side / 2 * FLIPS.T).unbind(2):
            distance = (corner[:, 0] - x).square_() + (corner[:, 1] - y).square_()
            wins |= distance <= distance[:1] + 1e-5
        wins, order = wins.sort(dim=0, descending=True, stable=True)
        kept = torch.where(wins, candidates.gather(0, order), candidates[:1])
        kept = kept[: int(wins.sum(0).max())].short().contiguous()
        return cls(len(codewords).bit_length(), codewords, cells, kept, wins[1])

    def nearest(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Entry, int16, of the codeword of class 0 nearest to points (x, y), any shape, float32."""
        x, y, shape = x.clamp(-REACH, REACH).flatten(), y.clamp(-REACH, REACH).flatten(), x.shape
        column, row = (
            ((z + REACH) * (self.cells / (2 * REACH))).to(torch.int32).clamp_(max=self.cells - 1)
            for z in (x, y)
        )
        cell = column * self.cells + row
        entries = self.candidates[0].index_select(0, cell)
        at = self.contested.index_select(0, cell).nonzero()[:, 0]
        x, y, cell, best = x[at], y[at], cell[at], entries[at]
        least = self.distance(x, y, best)
        for candidates in self.candidates[1:]:
            entry = candidates.index_select(0, cell)
            distance = self.distance(x, y, entry)
            best = torch.where(distance < least, entry, best)
            least = torch.minimum(distance, least)
        entries[at] = best
        return entries.view(shape)

    def distance(self, x: torch.Tensor, y: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        """Squared distance from points (x, y) to codewords of class 0."""
        at = entry.flatten().int()
        near_x, near_y = (c.index_select(0, at).view(x.shape) for c in self.codewords.T)
        return (x - near_x).square().add_((y - near_y).square())


def encode(coordinates: torch.Tensor, book: Book, trellis: Trellis) -> torch.Tensor:
    """The best path of every row.

    Args:
        coordinates: [N, K] float32; a row is a sequence of K / 2 pairs.
    Returns:
        Indices [N, K / 2] int16: the entry, and the path bit above it.
    """
    pairs = coordinates.T.unflatten(0, (-1, 2))  # [P, 2, N]
    num_pairs, _, num_rows = pairs.shape
    cost = torch.full((trellis.states, num_rows), torch.inf)
    cost[0] = 0
    # a register's state before is r >> 1 and after r & (states - 1): two lead to each
    classes = trellis.classes()
    old = torch.arange(2 * trellis.states) >> 1
    entries = torch.empty(num_pairs, 4, num_rows, dtype=torch.int16)
    second = torch.empty(num_pairs, trellis.states, num_rows, dtype=torch.bool)
    for p in range(num_pairs):
        x, y = (FLIPS[:, i, None] * pairs[p, i] for i in range(2))  # [4, N], as if of class 0
        entries[p] = book.nearest(x, y)
        added = book.distance(x, y, entries[p])
        costs = (cost[old] + added[classes]).view(2, trellis.states, num_rows)
        second[p] = costs[1] < costs[0]
        cost = torch.minimum(costs[0], costs[1])
    state = cost.argmin(0)
    indices = torch.empty(num_pairs, num_rows, dtype=torch.int16)
    for p in reversed(range(num_pairs)):
        register = state + trellis.states * second[p].gather(0, state[None])[0]
        entry = entries[p].gather(0, classes[register][None])[0]
        indices[p] = entry | (register & 1).to(torch.int16) << (book.index_bits - 1)
        state = register >> 1
    return indices.T.contiguous()


def pair_classes(indices: torch.Tensor, index_bits: int, trellis: Trellis) -> torch.Tensor:
    """Class [N, P] int64 of every pair of rows of indices [N, P] int16."""
    bits = (indices >> (index_bits - 1)).long() & 1
    register = bits.clone()
    for delay in range(1, trellis.states.bit_length()):
        register[:, delay:] |= bits[:, :-delay] << delay
    return trellis.classes()[register]


def decode(indices: torch.Tensor, book: Book, trellis: Trellis) -> torch.Tensor:
    """Coordinates [N, 2 P] float32 of rows of indices [N, P] int16, each a sequence."""
    entries = (indices & (len(book.codewords) - 1)).int()
    flips = FLIPS[pair_classes(indices, book.index_bits, trellis)]
    return (book.codewords[entries] * flips).flatten(1)


def lattice(index_bits: int) -> torch.Tensor:
    """Class 0 before a fit [2^(b-1), 2] float32: as many points in every quadrant.

    Those next to the origin, with radii companded as a Gaussian of variance SPREAD has them: a part
    r^2 / R^2 of the disk of the points is that part of the Gaussian's mass.
    """
    steps = 2 * torch.arange(-(1 << index_bits // 2), 1 << index_bits // 2) + 0.5
    points = torch.cartesian_prod(steps, steps)
    quadrant = (points[:, 0] < 0).int() + 2 * (points[:, 1] < 0).int()
    squares = points.square().sum(1)
    order = squares.argsort(stable=True)
    per_quadrant = 1 << (index_bits - 3)
    kept = torch.cat([order[quadrant[order] == q][:per_quadrant] for q in range(4)])
    points, squares = points[kept], squares[kept]
    inside = squares * math.pi / (16 * per_quadrant)  # of 4 units of area each
    inside = inside.clamp(max=1 - 0.5 / len(points))
    return points * ((-2 * SPREAD * (1 - inside).log()) / squares).sqrt()[:, None]


def gaussian_rows(num_pairs: int, length: int, seed: int) -> torch.Tensor:
    """Coordinates [num_pairs / length, 2 * length] float32 of the unit normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_pairs // length, 2 * length, generator=generator)


def lloyd(index_bits: int, trellis: Trellis = EIGHT) -> Iterator[tuple[float, Book]]:
    """Fit a book: every codeword becomes the mean of what is coded as it, again and again.

    Each round codes rows of its own, and means fade slowly, so that a book fits no chance of them.

    Yields:
        A book, and the mean squared error per coordinate on rows that it was not fitted to.
    """
    codewords = lattice(index_bits)
    sums = torch.zeros_like(codewords, dtype=torch.float64)
    counts = torch.zeros(len(codewords), 1, dtype=torch.float64)
    for seed in itertools.count(1):
        book, rows = Book.of(codewords), gaussian_rows(FIT_PAIRS, FIT_LENGTH, seed)
        indices = encode(rows, book, trellis)
        yield float((decode(indices, book, trellis) - rows).square().mean()), book
        flips = FLIPS[pair_classes(indices, index_bits, trellis)]
        points = (rows.unflatten(1, (-1, 2)) * flips).flatten(0, 1).double()
        entries = (indices & (len(codewords) - 1)).flatten().int()
        sums = (FADE * sums).index_add_(0, entries, points)
        counts = FADE * counts + torch.bincount(entries, minlength=len(codewords))[:, None]
        codewords = torch.where(counts > 0, sums / counts, codewords.double()).float()


@functools.cache
def fitted_book(index_bits: int) -> Book:
    """The book of b index bits, fitted with eight states; the same every time."""
    return next(itertools.islice(lloyd(index_bits), FIT_ROUNDS, None))[1]


Code = Callable[[torch.Tensor], torch.Tensor]
"""Coordinates [N, K] float32 -> decoded ones."""


def trellis_code(book: Book, trellis: Trellis) -> Code:
    """The code in which every row is a sequence."""
    return lambda rows: decode(encode(rows, book, trellis), book, trellis)


def scalar_code(window: Window) -> Code:
    """The code in which every row is a sequence."""
    return lambda rows: trellis_scalar.decode(trellis_scalar.encode(rows, window), window)


def codes(index_bits: int) -> Iterator[tuple[str, Code, int, int]]:
    """What the table compares: name, code, pairs of a sequence, and pairs that are measured."""
    yield "plain QAM", lambda x: nearest_codewords(x, index_bits), WORD_PAIRS, PAIRS
    book = fitted_book(index_bits)
    for trellis in (EIGHT, SIXTY_FOUR):
        code, name = trellis_code(book, trellis), f"trellis QAM, {trellis.states} states"
        yield f"{name}, words start at 0", code, WORD_PAIRS, PAIRS
        yield f"{name}, words go on", code, ROW_WORDS * WORD_PAIRS, PAIRS
    for bits, pairs in SCALAR_PAIRS.items():
        code = scalar_code(Window.of(bits, index_bits))
        yield f"scalar trellis, window of {bits} bits", code, SCALAR_LENGTH // 2, pairs


def sqnr(code: Code, length: int, num_pairs: int) -> tuple[float, float]:
    """Signal to noise ratio on the unit normal and its standard error, dB.

    Args:
        length: pairs of a sequence.
    """
    rows = gaussian_rows(num_pairs, length, SEED)
    errors = torch.cat([(code(x) - x).square().mean(1) for x in rows.split(ROWS_AT_ONCE)])
    mean = float(errors.mean())
    relative_error = float(errors.std()) / mean / math.sqrt(len(errors))
    return -10 * math.log10(mean), 10 / math.log(10) * relative_error


def measured(index_bits: int) -> Iterator[Row]:
    """Rows of results/trellis.json."""
    for name, code, length, num_pairs in codes(index_bits):
        ratio, error = sqnr(code, length, num_pairs)
        print(f"{index_bits} bits, {name}: {ratio:.2f} dB", flush=True)
        yield {
            "code": name,
            "index_bits": index_bits,
            "num_pairs": num_pairs,
            "sqnr_db": round(ratio, 3),
            "sqnr_db_se": round(error, 3),
        }


def main() -> None:
    rows = [row for index_bits in TABLE_BITS for row in measured(index_bits)]
    SQNR_FILE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(sqnr_table(rows))


if __name__ == "__main__":
    main()
