"""Error feedback along the paths of a trellis: each state has targets of its own.

Viterbi's algorithm keeps the best path to every state, the *survivors*. What is best for later
pairs depends on the errors before them, so here every survivor carries its errors along, and a
pair's target is that of its own path (per-survivor processing). The error that is minimized,
and the notation, are those of :mod:`.feedback`, with inputs in the order in which paths visit them
(``path_inputs``). Then units can be coded again, in order, with all other units fixed
(:func:`sweep`).

Codewords come from a table of square cells, which has the codeword nearest to each cell's center.
Cells are so small that another codeword is nearer only where two are almost equally near.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from offline_quantize.encoding.feedback import factor, feedback_matrix, pair_blocks
from qamw_kernels.codec.nearest import grid, nearest_entry
from qamw_kernels.codec.trellis import PATH_ORDER, STATES, classes_of_registers, path_inputs
from qamw_kernels.format.codebook import TRELLIS, entry_bits
from qamw_kernels.format.packing import UNIT_INPUTS, UNIT_PAIRS

CELLS = 1024  # per side: a power of two, so that a flip of all bits mirrors a cell
REACH = 6.0  # cells cover [-REACH, REACH)^2; points outside use a cell at the border
SWEEPS = 2  # of sweeping_coder
ROUNDING = 1e-12  # of the mean diagonal: damping against rounding errors, too small to matter
BLOCK_INPUTS = 8  # coded between two reorderings of older errors by survivor
ROWS_AT_ONCE = 4096  # few enough for the cache, enough for efficient operations


class Book(NamedTuple):
    """A codebook as a table of cells, and the sign flips of each register.

    A packed codeword holds x in its upper and y in its lower half, as bfloat16.

    Attributes:
        cells: [CELLS**2] int32: the packed codeword of class 0 nearest to each cell's center.
        mirror: [2 S] int32, by register: XOR with a cell's number mirrors the cell in those of x
            and y that the register's class negates.
        signs: [2 S] int32, by register: XOR with a packed codeword negates the same ones.
        index_bits: of the codebook.
    """

    cells: torch.Tensor
    mirror: torch.Tensor
    signs: torch.Tensor
    index_bits: int


@functools.lru_cache(maxsize=16)
def book_of(index_bits: int, device: torch.device) -> Book:
    """The book of a trellis code; cached, treat it as read-only."""
    of_codebook = grid(index_bits, TRELLIS, device)
    centers = (torch.arange(CELLS, device=device) + 0.5) * (2 * REACH / CELLS) - REACH
    points = torch.cartesian_prod(centers, centers)
    halves = of_codebook.entries.bfloat16().view(torch.int16).int()  # entries are exact
    packed = halves[:, 0] << 16 | halves[:, 1] & 0xFFFF
    numbers = nearest_entry(points[:, 0].contiguous(), points[:, 1].contiguous(), of_codebook)
    classes, of_register = classes_of_registers(device)
    x, y = (classes[of_register] < 0).int().unbind(1)
    return Book(
        packed[numbers.int()],
        (x * CELLS + y) * (CELLS - 1),
        x << 31 | y << 15,
        index_bits,
    )


def unpacked(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y, float32, of packed codewords of any shape."""
    return (packed & -(1 << 16)).view(torch.float32), (packed << 16).view(torch.float32)


class Unit(NamedTuple):
    """What is needed to code the pairs of one unit, with feedback among them.

    Attributes:
        feedback: [64, 64] float32, of :func:`.feedback.feedback_matrix`.
        metric: [32, 2, 2] floats: R[p, p] R[p, p]^T, the quadratic form of a pair's error.
    """

    feedback: torch.Tensor
    metric: list[list[list[float]]]

    @classmethod
    def of(cls, root: torch.Tensor, feedback: torch.Tensor) -> "Unit":
        """The unit of a root [64, 64] float64, such as a diagonal block of R, and its feedback."""
        blocks = pair_blocks(root)
        return cls(feedback, (blocks @ blocks.mT).tolist())


def sweeping_coder(root: torch.Tensor, index_bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The :func:`trellis_coder` that codes every unit SWEEPS more times."""
    return trellis_coder(root, index_bits, SWEEPS)


def trellis_coder(
    root: torch.Tensor, index_bits: int, sweeps: int = 0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that codes coordinates [n, K] float32 as indices [n, P] int16, with feedback.

    Args:
        root: R [K, K] float64 of inputs in the order ``path_inputs(K)``.
        sweeps: how often every unit is coded again, see :func:`sweep`.
    """
    book = book_of(index_bits, root.device)
    root = root / root.diagonal().square().mean().sqrt()  # costs stay in the range of float32
    feedback = feedback_matrix(root)
    parts = [slice(i, i + UNIT_INPUTS) for i in range(0, len(root), UNIT_INPUTS)]
    units = [Unit.of(root[part, part], feedback[part, part]) for part in parts]
    if sweeps:
        hessian = root @ root.T
        roots = [factor(hessian[part, part], ROUNDING) for part in parts]
        alone = [Unit.of(own, feedback_matrix(own)) for own in roots]
        hessian = hessian.float()

    def code(coordinates: torch.Tensor) -> torch.Tensor:
        wanted = coordinates[:, path_inputs(coordinates.shape[1])].T.contiguous()
        indices, errors = encode_paths(wanted, feedback, units, book)
        for _ in range(sweeps):
            sweep(wanted, indices, errors, hessian, alone, book)
        in_order = torch.empty_like(indices)
        in_order[:, list(PATH_ORDER)] = indices
        return in_order.flatten(0, 1).T

    def code_all(coordinates: torch.Tensor) -> torch.Tensor:
        count = -(-len(coordinates) // ROWS_AT_ONCE)
        return torch.cat([code(part) for part in coordinates.tensor_split(max(1, count))])

    return code_all


def encode_paths(
    wanted: torch.Tensor, feedback: torch.Tensor, units: list[Unit], book: Book
) -> tuple[torch.Tensor, torch.Tensor]:
    """Code coordinates with error feedback along paths.

    Args:
        wanted: [K, N] float32, in the order of paths.
        feedback: [K, K] float32, of :func:`.feedback.feedback_matrix`; in the same order.
        units: for every unit, its part of the diagonal.
    Returns:
        Indices [K / 64, 32, N] int16 and errors u - q [K, N], in the order of paths.
    """
    errors, indices = torch.empty_like(wanted), []
    for number, unit in enumerate(units):
        start = number * UNIT_INPUTS
        part = slice(start, start + UNIT_INPUTS)
        targets = torch.addmm(wanted[part], feedback[:start, part].T, errors[:start])
        chosen, errors[part] = _code_unit(wanted[part], targets, unit, book)
        indices.append(chosen)
    return torch.stack(indices), errors


def sweep(
    wanted: torch.Tensor,
    indices: torch.Tensor,
    errors: torch.Tensor,
    hessian: torch.Tensor,
    units: list[Unit],
    book: Book,
) -> None:
    """Code every unit again with all other units fixed; keep the rows whose error becomes less.

    Args:
        wanted: [K, N].
        indices, errors: of :func:`encode_paths`; changed in place.
        hessian: [K, K] float32.
        units: made of its diagonal blocks [64, 64] alone.
    """
    for number, unit in enumerate(units):
        part = slice(number * UNIT_INPUTS, (number + 1) * UNIT_INPUTS)
        own = hessian[part, part]
        # from the codewords to the best point
        step = torch.linalg.solve(own, hessian[part] @ errors)
        best = wanted[part] - errors[part] + step
        chosen, left = _code_unit(best, best, unit, book)
        better = (left * (own @ left)).sum(0) < (step * (own @ step)).sum(0)
        indices[number] = torch.where(better, chosen, indices[number])
        errors[part] -= (step - left) * better


def _code_unit(
    wanted: torch.Tensor, targets: torch.Tensor, unit: Unit, book: Book
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best path through a unit [64, N]: indices [32, N] and errors u - q [64, N].

    Args:
        targets: [64, N]: ``wanted`` plus what makes up for the errors of earlier units.
    """
    feedback, metric = unit
    num_rows = wanted.shape[1]
    cost = wanted.new_full((STATES, num_rows), torch.inf)
    cost[0] = 0
    errors = wanted.new_empty(UNIT_INPUTS, STATES, num_rows)
    packed = errors.new_empty(UNIT_PAIRS, STATES, num_rows, dtype=torch.int32)
    second = torch.empty_like(packed, dtype=torch.bool)
    unmoved = torch.arange(STATES, device=wanted.device)[:, None].expand(-1, num_rows)
    for start in range(0, UNIT_INPUTS, BLOCK_INPUTS):
        stop = start + BLOCK_INPUTS
        made_up = feedback[:start, start:stop].T @ errors[:start].flatten(1)
        # Errors of the pairs that are coded already, and targets of the others.
        block = targets[start:stop, None] + made_up.view(-1, STATES, num_rows)
        ancestors = unmoved
        for i in range(0, BLOCK_INPUTS, 2):
            at = (start + i) // 2
            cost, packed[at], second[at] = _branch(block[i : i + 2], cost, metric[at], book)
            block, ancestors = _descend(block, second[at]), _descend(ancestors, second[at])
            for axis, codewords in enumerate(unpacked(packed[at])):
                torch.sub(wanted[start + i + axis], codewords, out=block[i + axis])
            local = feedback[start + i : start + i + 2, start + i + 2 : stop]
            block[i + 2 :].flatten(1).addmm_(local.T, block[i : i + 2].flatten(1))
        if start:
            errors[:start] = errors[:start].gather(1, ancestors.expand(start, -1, -1))
        errors[start:stop] = block
    best = cost.argmin(0, keepdim=True)  # [1, N]
    indices = _trace_back(best[0], packed, second, book)
    return indices, errors.gather(1, best.expand(UNIT_INPUTS, -1, -1))[:, 0]


def _branch(
    target: torch.Tensor, cost: torch.Tensor, metric: list[list[float]], book: Book
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Extend every survivor by one pair, with either path bit; keep the better way to each state.

    Args:
        target: [2, S, N]. cost: [S, N]. metric: [2, 2].
    Returns:
        For the new survivors, [S, N] each: the cost, the packed codeword, and whether it descends
        from the second of the two old survivors that lead to it.
    """
    num_rows = cost.shape[1]
    # Registers r = S h + 2 j + bit are [2, S / 2, 2, N]. State r >> 1 leads to r % S.
    old, registers = (2, STATES // 2, 1, num_rows), (2, STATES // 2, 2, 1)
    scaled = target.clamp(-REACH, REACH - 2 * REACH / CELLS).add_(REACH).mul_(CELLS / (2 * REACH))
    column, row = scaled.to(torch.int32)
    cell = torch.add(row, column, alpha=CELLS).view(old) ^ book.mirror.view(registers)
    packed = book.cells.index_select(0, cell.flatten()).view(cell.shape)
    packed ^= book.signs.view(registers)
    x, y = (t.view(old) - c for t, c in zip(target, unpacked(packed), strict=True))
    (xx, xy), (_, yy) = metric
    costs = torch.addcmul(cost.view(old), x, x, value=xx - xy * xy / yy)
    y.add_(x, alpha=xy / yy)
    first, other = costs.addcmul_(y, y, value=yy).view(2, STATES, num_rows)
    second = other < first
    packed = packed.view(2, STATES, num_rows)
    return torch.minimum(first, other), torch.where(second, packed[1], packed[0]), second


def _descend(values: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Values [..., S, N] of old survivors, reordered for the new ones that descend from them.

    Args:
        second: [S, N], whether new survivor s descends from (s + S) >> 1, and not from s >> 1.
    """
    num_rows = second.shape[1]
    old = values.view(*values.shape[:-2], 2, STATES // 2, 1, num_rows)
    chosen = torch.where(
        second.view(STATES // 2, 2, num_rows),
        old[..., 1, :, :, :],
        old[..., 0, :, :, :],
    )
    return chosen.view(values.shape)


def _trace_back(
    best: torch.Tensor, packed: torch.Tensor, second: torch.Tensor, book: Book
) -> torch.Tensor:
    """Indices [32, N] int16 of the path that ends in survivor ``best`` [N] int64.

    Args:
        packed, second: [32, S, N] of every pair, as of :func:`_branch`.
    """
    chosen = torch.empty_like(packed[:, 0])
    registers = torch.empty_like(chosen, dtype=torch.int64)
    survivor = best
    for at in reversed(range(UNIT_PAIRS)):
        chosen[at] = packed[at].gather(0, survivor[None])[0]
        from_second = second[at].gather(0, survivor[None])[0]
        registers[at] = survivor + STATES * from_second
        survivor = registers[at] >> 1
    of_class_0 = chosen ^ book.signs[registers]
    x, y = unpacked(of_class_0.flatten())
    numbers = nearest_entry(x, y, grid(book.index_bits, TRELLIS, x.device)).view(chosen.shape)
    return numbers | (registers & 1).to(torch.int16) << entry_bits(book.index_bits, TRELLIS)
