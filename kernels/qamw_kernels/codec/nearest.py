"""Exact nearest codeword, fast: every cell of a grid lists the entries that can be nearest in it.

The points nearer to one entry than to another form a half-plane. So an entry can be struck off the
list of a cell when one other entry is nearer at all four corners. A small margin keeps entries that
float32 rounding could make the winner, so that results, ties included, are exactly those of a
search over all entries (:func:`nearest_entry_brute_force`).
"""

import functools
from typing import NamedTuple

import torch

from qamw_kernels.format.codebook import PLAIN, load_entries

CHUNK = 1 << 16
"""Pairs worked on at once: the temporaries stay in cache."""

# Squares that grids cover, [low, high)^2: the few points outside are searched exhaustively. Entries
# of the plain code are in the positive quadrant, those of the trellis on all sides.
_QUADRANT, _PLANE = (0.0, 6.0), (-6.5, 6.5)
_MARGIN = 1e-4  # in squared distance, whose float32 rounding within a grid stays below 1e-5


class Grid(NamedTuple):
    """Square cells of the plane, and which entries of a codebook can be nearest in each.

    Attributes:
        cells: per side.
        low, high: ends of the square in both coordinates.
        only: [cells**2] int16: the one entry that can be nearest in the cell, or -1 for several.
        candidates: [L, cells**2] int16: entries, ascending, padded by repetition.
        entries: [E, 2] float32.
    """

    cells: int
    low: float
    high: float
    only: torch.Tensor
    candidates: torch.Tensor
    entries: torch.Tensor


@functools.cache
def _grid_on_cpu(index_bits: int, code: str) -> Grid:
    return make_grid(load_entries(index_bits, code), code, torch.device("cpu"))


@functools.lru_cache(maxsize=32)
def grid(index_bits: int, code: str, device: torch.device) -> Grid:
    """The grid of a codebook, on ``device``; cached, treat it as read-only."""
    made = _grid_on_cpu(index_bits, code)
    return made._replace(
        only=made.only.to(device),
        candidates=made.candidates.to(device),
        entries=made.entries.to(device),
    )


def make_grid(entries: torch.Tensor, code: str, device: torch.device) -> Grid:
    """The grid of any entries [E, 2] float32 in the same part of the plane as those of ``code``."""
    low, high = _QUADRANT if code == PLAIN else _PLANE
    cells, table = 1, torch.arange(len(entries), device=entries.device)[None]
    while cells < 128 or cells < 8 * len(entries) ** 0.5:
        # split every cell in four, then strike off again
        cells *= 2
        table = table.view(cells // 2, 1, cells // 2, 1, -1)
        table = table.expand(-1, 2, -1, 2, -1).reshape(cells * cells, -1)
        table = _strike_off(table, entries.double(), cells, low, high)
    only = torch.where((table == table[:, :1]).all(1), table[:, 0], -1)
    candidates = table.T.contiguous()
    return Grid(
        cells,
        low,
        high,
        only.to(device, torch.int16),
        candidates.to(device, torch.int16),
        entries.to(device),
    )


def _strike_off(
    table: torch.Tensor, entries: torch.Tensor, cells: int, low: float, high: float
) -> torch.Tensor:
    """Drop the candidates [cells**2, L] that cannot win anywhere in their cell.

    L shrinks to the longest list left.
    """
    side = (high - low) / cells
    at = torch.arange(cells * cells, device=entries.device)
    first = low + torch.stack((at // cells, at % cells), 1).float() * side  # [cells**2, 2]
    # [cells**2, 4, 2]
    corners = first[:, None] + first.new_tensor([[0, 0], [0, side], [side, 0], [side, side]])
    # [cells**2, 4, L]
    distance = (corners[:, :, None].double() - entries[table][:, None]).square().sum(3)
    champion = distance.amax(1).argmin(1)[:, None, None].expand(-1, 4, 1)
    struck = (distance.gather(2, champion) + _MARGIN < distance).all(1)
    if table.shape[1] <= 32:  # all pairs
        struck |= (distance[..., None] + _MARGIN < distance[..., None, :]).all(1).any(1)
    length = int((~struck).sum(1).max())
    end = len(entries)
    kept = table.masked_fill(struck, end).sort(1).values[:, :length]
    # Pad by repeating the last real candidate; repetitions of earlier lists collapse here too.
    repeated = torch.zeros_like(kept, dtype=torch.bool)
    repeated[:, 1:] = kept[:, 1:] == kept[:, :-1]
    kept = kept.masked_fill(repeated, end).sort(1).values
    last = kept.masked_fill(kept == end, -1).amax(1, keepdim=True)
    kept = torch.where(kept == end, last, kept)
    length = int((kept[:, 1:] != kept[:, :-1]).sum(1).max()) + 1
    return kept[:, :length]


def nearest_entry_brute_force(
    x: torch.Tensor, y: torch.Tensor, entries: torch.Tensor
) -> torch.Tensor:
    """Reference of :func:`nearest_entry`: searches all ``entries`` [E, 2]; for ties, the lowest."""
    rows = []
    for some_x, some_y in zip(torch.split(x, 4096), torch.split(y, 4096), strict=True):
        x_distance = (some_x[:, None] - entries[:, 0]).square()  # [s, E]
        y_distance = (some_y[:, None] - entries[:, 1]).square()
        rows.append((x_distance + y_distance).argmin(1))
    return torch.cat(rows).to(torch.int16)


def nearest_entry(x: torch.Tensor, y: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Number of the entry nearest to every point (x, y).

    Where two are equally near, the lower one.

    Args:
        x, y: [S] float32, finite.
    Returns:
        [S] int16. Equal to :func:`nearest_entry_brute_force`, bit for bit.
    """
    scale = grid.cells / (grid.high - grid.low)
    column, row = (
        ((z - grid.low) * scale).clamp_(0, grid.cells - 1).to(torch.int32) for z in (x, y)
    )
    cell = column.mul_(grid.cells).add_(row)
    numbers = grid.only.index_select(0, cell)
    contested = (numbers < 0).nonzero()[:, 0]
    numbers[contested] = _best_candidate(x[contested], y[contested], cell[contested], grid)
    ends = torch.maximum(x, y) >= grid.high
    if grid.low:
        ends |= torch.minimum(x, y) < grid.low
    if len(outside := ends.nonzero()[:, 0]):
        numbers[outside] = nearest_entry_brute_force(x[outside], y[outside], grid.entries)
    return numbers


def _best_candidate(
    x: torch.Tensor,
    y: torch.Tensor,
    cell: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Nearest candidate of each point's cell; of equally near ones the lowest.

    Candidates ascend, so the first of the nearest is the lowest.
    """
    best = torch.empty_like(cell, dtype=torch.int16)
    best_distance = torch.full_like(x, torch.inf)
    for candidates in grid.candidates:
        candidate = candidates.index_select(0, cell)
        at = candidate.int()
        distance = (x - grid.entries[:, 0].index_select(0, at)).square_()
        distance += (y - grid.entries[:, 1].index_select(0, at)).square_()
        best = torch.where(distance < best_distance, candidate, best)
        best_distance = torch.minimum(distance, best_distance)
    return best


def nearest(points: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Index in the plain code of the codeword nearest to every point.

    By symmetry it is in the point's own quadrant; where rounding makes a codeword of another
    quadrant seem equally near, the point's signs decide. For ties within the quadrant, see
    :func:`nearest_entry`.

    Args:
        points: [S, 2] float32, finite.
    Returns:
        [S] int16 (indices are below 4096).
    """
    of_codebook = grid(index_bits, PLAIN, points.device)
    out = torch.empty(len(points), dtype=torch.int16, device=points.device)
    for i in range(0, len(points), CHUNK):
        chunk = points[i : i + CHUNK]
        x, y = (chunk[:, j].contiguous().abs() for j in range(2))
        out[i : i + CHUNK] = nearest_entry(x, y, of_codebook) | _signs(chunk, index_bits)
    return out


def nearest_brute_force(points: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Reference of :func:`nearest`."""
    x, y = points.abs().T
    numbers = nearest_entry_brute_force(x, y, load_entries(index_bits, PLAIN).to(points.device))
    return numbers | _signs(points, index_bits)


def _signs(points: torch.Tensor, index_bits: int) -> torch.Tensor:
    """The two top bits of the indices [S] int16: 1 where x, and where y, is negative."""
    negative = (points < 0).to(torch.int16)
    return (negative[:, 0] << (index_bits - 2)) | (negative[:, 1] << (index_bits - 1))
