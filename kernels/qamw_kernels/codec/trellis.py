"""Trellis-coded QAM: as many bits per pair as the plain code, but twice as many codewords.

The methods are Ungerboeck's trellis-coded modulation, known from modems, and trellis-coded
quantization (Marcellin and Fischer, 1990). A codebook of b index bits has 2**(b + 1) codewords in
four classes. Class 0 has the codebook's entries; flipping their sign of x, of y, or of both gives
the codewords of the other classes. An index holds the number of an entry, in b - 1 bits, and above
it one bit of the *path*. A register holds the path bits of a pair and of the three pairs before it,
and two parities of the register say which signs are flipped:

    x is negated if bit ^ (1 before) ^ (2 before) ^ (3 before) is 1
    y is negated if bit              ^ (2 before) ^ (3 before) is 1

So a pair's own bit chooses between two of the four classes, and the three bits before it decide
which two. A path runs through the 32 pairs of a unit, in the order :data:`PATH_ORDER`. The bits
before the first pair of a unit are 0, so every unit is decoded by itself.

:func:`encode` finds the best path by Viterbi's algorithm. The generators are 1111 and 1101, with
the pair's own bit last.
"""

import functools

import torch

from qamw_kernels.codec.nearest import Grid, grid, nearest_entry
from qamw_kernels.format.codebook import TRELLIS, entry_bits, flip_signs
from qamw_kernels.format.packing import UNIT_INPUTS, UNIT_PAIRS

STATES = 8
"""How many values the three bits before a pair can have; the last of the three is lowest."""

GENERATORS = (0b1111, 0b1101)
"""Bits of the register whose parity is the sign of x, and of y; the pair's own bit is lowest."""

PATH_ORDER = tuple(
    16 * (step >> 1 & 1) + 4 * (step >> 3) + 2 * (step & 1) + (step >> 2 & 1)
    for step in range(UNIT_PAIRS)
)
"""The pairs of a unit as the path visits them.

The bits of a step's number, from the highest, are bits 3, 2, 0, 4 and 1 of the pair's number. Steps
4 n to 4 n + 3 are in one lane of a matrix instruction with 16 x 16 operands, so that a kernel finds
the three bits before a pair in its own word and in that of the lane next to it (see
:mod:`qamw_kernels.ops.tiling`).
"""

UNITS_AT_ONCE = 1 << 13
"""Units encoded at once: the temporaries stay in cache."""


def path_inputs(num_inputs: int) -> torch.Tensor:
    """The inputs of a row [K] int64 as paths visit them, unit by unit."""
    pairs = torch.arange(num_inputs).view(-1, UNIT_PAIRS, 2)
    return pairs[:, list(PATH_ORDER)].flatten()


@functools.cache
def classes_of_registers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The signs of every class, and the class that every value of the register selects.

    Returns:
        Factors of x and y, [4, 2] float32, 1 or -1: class 1 negates x, 2 y, and 3 both; and
        classes [16] int64.
    """
    signs = flip_signs(torch.ones(1, 2, device=device))
    x, y = ([(r & mask).bit_count() & 1 for r in range(2 * STATES)] for mask in GENERATORS)
    return signs, torch.tensor(x, device=device) + 2 * torch.tensor(y, device=device)


def codebook_rows(indices: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Rows of the whole codebook (``load_codebook``) that indices [N, P] int16 stand for.

    Returns:
        [N, P] int16.
    """
    low = entry_bits(index_bits, TRELLIS)
    bits = (indices >> low & 1).view(len(indices), -1, UNIT_PAIRS)[..., list(PATH_ORDER)]
    before = torch.nn.functional.pad(bits, (STATES.bit_length() - 1, 0))
    back = [before[..., 3 - steps : UNIT_PAIRS + 3 - steps] for steps in range(4)]
    flips = torch.zeros_like(bits)
    for axis, mask in enumerate(GENERATORS):
        for steps, bit in enumerate(back):
            if mask >> steps & 1:
                flips ^= bit << axis
    in_order = torch.empty_like(flips)
    in_order[..., list(PATH_ORDER)] = flips
    return indices & ((1 << low) - 1) | in_order.view(indices.shape) << low


def encode(coordinates: torch.Tensor, index_bits: int) -> torch.Tensor:
    """The indices whose codewords have the least squared error.

    Args:
        coordinates: [N, K] float32, finite; K a multiple of 64.
    Returns:
        [N, K / 2] int16.
    """
    units = coordinates.reshape(-1, UNIT_INPUTS)
    of_codebook = grid(index_bits, TRELLIS, units.device)
    found = [best_paths(part, of_codebook) for part in torch.split(units, UNITS_AT_ONCE)]
    return torch.cat(found).view(len(coordinates), -1)


def best_paths(units: torch.Tensor, of_codebook: Grid) -> torch.Tensor:
    """Indices [n, 32] int16 of units [n, 64] float32, each a path of its own."""
    pairs = units.T.reshape(UNIT_PAIRS, 2, -1)[list(PATH_ORDER)].contiguous()  # [32, 2, n]
    classes, of_register = classes_of_registers(units.device)
    cost = units.new_full((STATES, len(units)), torch.inf)
    cost[0] = 0
    # Register r comes from state r >> 1 and leads to state r & 7: r and r + 8 lead to the same.
    before = torch.arange(2 * STATES, device=units.device) >> 1
    numbers = units.new_empty(UNIT_PAIRS, len(classes), len(units), dtype=torch.int16)
    second = units.new_empty(UNIT_PAIRS, STATES, len(units), dtype=torch.bool)
    for step, pair in enumerate(pairs):
        x, y = (classes[:, i, None] * pair[i] for i in range(2))  # [4, n], moved to class 0
        numbers[step] = nearest_entry(x.flatten(), y.flatten(), of_codebook).view(x.shape)
        near = of_codebook.entries[numbers[step].int()]
        added = (x - near[..., 0]).square_() + (y - near[..., 1]).square_()
        costs = (cost[before] + added[of_register]).view(2, STATES, len(units))
        second[step] = costs[1] < costs[0]
        cost = torch.minimum(costs[0], costs[1])
    state = cost.argmin(0)
    low = len(of_codebook.entries).bit_length() - 1
    indices = units.new_empty(len(units), UNIT_PAIRS, dtype=torch.int16)
    for step in reversed(range(UNIT_PAIRS)):
        register = state + STATES * second[step].gather(0, state[None])[0]
        number = numbers[step].gather(0, of_register[register][None])[0]
        indices[:, PATH_ORDER[step]] = number | (register & 1).to(torch.int16) << low
        state = register >> 1
    return indices
