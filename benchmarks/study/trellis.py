"""Codes on the unit normal: plain QAM, the trellis, and what a larger trellis would gain.

The product's trellis has eight states, and before every word all bits are 0
(:mod:`qamw_kernels.codec.trellis`). Here are codes that it does not have: with 64 states, and with
words that go on from the path bits of the word before. They use the product's codewords.

``python -m benchmarks.study.trellis`` measures all codes (minutes), and writes
results/trellis.json.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.study import trellis_scalar
from benchmarks.study.report import SQNR_FILE, Row, sqnr_table
from benchmarks.study.trellis_scalar import Window
from qamw_kernels.codec.encode import code_coordinates
from qamw_kernels.codec.nearest import Grid, grid, nearest_entry
from qamw_kernels.codec.trellis import GENERATORS, STATES
from qamw_kernels.format.codebook import PLAIN, TRELLIS

WORD_PAIRS = 32  # a word holds 32 bits of one plane
TABLE_BITS = (7, 8, 11, 12)
SEED = 20260101  # of the coordinates that are measured
PAIRS = 1 << 16  # measured of codes of pairs
ROW_WORDS = 32  # of a sequence in which words go on
ROWS_AT_ONCE = 2048  # coded at once
SCALAR_PAIRS = {8: 1 << 16, 12: 1 << 17, 16: 1 << 14}  # bits of the window -> pairs measured
SCALAR_LENGTH = 256  # weights of a sequence
FLIPS = torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])
"""[4, 2]: for every class, the signs that map class 0 to it, and it to class 0."""


class Trellis(NamedTuple):
    """A feed-forward shift register.

    Attributes:
        states: how many values the path bits before a pair can have: a power of two.
        generators: masks of the register, 0 to 2 * states - 1; the lowest bit is the pair's own.
    """

    states: int
    generators: tuple[int, int]

    def classes(self) -> torch.Tensor:
        """Class [2 * states] int64 of every value of the register."""
        registers = range(2 * self.states)
        x, y = ([(r & mask).bit_count() & 1 for r in registers] for mask in self.generators)
        return torch.tensor(x) + 2 * torch.tensor(y)


EIGHT = Trellis(STATES, GENERATORS)
SIXTY_FOUR = Trellis(64, (91, 103))


def encode(coordinates: torch.Tensor, book: Grid, trellis: Trellis) -> torch.Tensor:
    """The best path of every row.

    Args:
        coordinates: [N, K] float32; a row is a sequence of K / 2 pairs.
        book: the grid of the entries.
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
        entries[p] = nearest_entry(x.flatten(), y.flatten(), book).view(x.shape)
        near = book.entries[entries[p].int()]
        added = (x - near[..., 0]).square_() + (y - near[..., 1]).square_()
        costs = (cost[old] + added[classes]).view(2, trellis.states, num_rows)
        second[p] = costs[1] < costs[0]
        cost = torch.minimum(costs[0], costs[1])
    state = cost.argmin(0)
    indices = torch.empty(num_pairs, num_rows, dtype=torch.int16)
    for p in reversed(range(num_pairs)):
        register = state + trellis.states * second[p].gather(0, state[None])[0]
        entry = entries[p].gather(0, classes[register][None])[0]
        indices[p] = entry | (register & 1).to(torch.int16) * len(book.entries)
        state = register >> 1
    return indices.T.contiguous()


def decode(indices: torch.Tensor, book: Grid, trellis: Trellis) -> torch.Tensor:
    """Coordinates [N, 2 P] float32 of rows of indices [N, P] int16, each a sequence."""
    entries, bits = (indices % len(book.entries)).int(), indices.long() // len(book.entries)
    register = bits.clone()
    for delay in range(1, trellis.states.bit_length()):
        register[:, delay:] |= bits[:, :-delay] << delay
    return (book.entries[entries] * FLIPS[trellis.classes()[register]]).flatten(1)


def gaussian_rows(num_pairs: int, length: int, seed: int) -> torch.Tensor:
    """Coordinates [num_pairs / length, 2 * length] float32 of the unit normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_pairs // length, 2 * length, generator=generator)


Code = Callable[[torch.Tensor], torch.Tensor]
"""Coordinates [N, K] float32 -> decoded ones."""


def trellis_code(book: Grid, trellis: Trellis) -> Code:
    """The code in which every row is a sequence."""
    return lambda rows: decode(encode(rows, book, trellis), book, trellis)


def scalar_code(window: Window) -> Code:
    """The code in which every row is a sequence."""
    return lambda rows: trellis_scalar.decode(trellis_scalar.encode(rows, window), window)


def codes(index_bits: int) -> Iterator[tuple[str, Code, int, int]]:
    """What the table compares: name, code, pairs of a sequence, and pairs that are measured."""
    ours = partial(code_coordinates, index_bits=index_bits)
    yield "plain QAM", partial(ours, code=PLAIN), WORD_PAIRS, PAIRS
    yield "trellis QAM, 8 states, words start at 0", partial(ours, code=TRELLIS), WORD_PAIRS, PAIRS
    book = grid(index_bits, TRELLIS, torch.device("cpu"))
    eight, more = trellis_code(book, EIGHT), trellis_code(book, SIXTY_FOUR)
    yield "trellis QAM, 8 states, words go on", eight, ROW_WORDS * WORD_PAIRS, PAIRS
    yield "trellis QAM, 64 states, words start at 0", more, WORD_PAIRS, PAIRS
    yield "trellis QAM, 64 states, words go on", more, ROW_WORDS * WORD_PAIRS, PAIRS
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
