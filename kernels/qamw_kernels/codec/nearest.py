"""Exact nearest codeword, fast: a grid over the quadrant lists every codeword that can win a cell.

Which of two codewords is nearer is a linear condition on the point, so codeword c can be struck off
a cell when one other codeword is nearer at all four corners. A small margin keeps float32 rounding,
and so ties, exactly as in a search over the whole codebook (:func:`nearest_brute_force`).
"""

import functools
from typing import NamedTuple

import torch

from qamw_kernels.format.codebook import load_quadrant

CHUNK = 1 << 16
"""Pairs worked on at once: the temporaries stay in cache."""

_REACH = 6.0  # the grid covers [0, _REACH)^2; the few pairs outside are searched exhaustively
_MARGIN = 1e-4  # in squared distance, whose float32 rounding within the grid stays below 1e-5


class Grid(NamedTuple):
    """The quadrant in square cells, and what can be nearest to a point of each.

    Attributes:
        cells: per side.
        only: [cells**2] int16: the one codeword that can win in the cell, or -1.
        candidates: [L, cells**2] int16: quadrant rows, ascending, padded by repetition.
        quadrant: [C / 4, 2] float32.
    """

    cells: int
    only: torch.Tensor
    candidates: torch.Tensor
    quadrant: torch.Tensor


def nearest_brute_force(points: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Reference of :func:`nearest`: every codeword of the point's own quadrant, lowest index first.

    By symmetry none of another quadrant is nearer; where rounding makes one seem as near, the
    point's signs decide.

    Args:
        points: [S, 2] float32, finite.
    Returns:
        [S] int16.
    """
    quadrant = load_quadrant(index_bits).to(points.device)  # [C / 4, 2]
    rows = []
    for chunk in torch.split(points.abs(), 4096):
        x_distance = (chunk[:, None, 0] - quadrant[:, 0]).square()  # [s, C / 4]
        y_distance = (chunk[:, None, 1] - quadrant[:, 1]).square()
        rows.append((x_distance + y_distance).argmin(1))
    return torch.cat(rows).to(torch.int16) | _signs(points, index_bits)


def _signs(points: torch.Tensor, index_bits: int) -> torch.Tensor:
    """The two top bits of the indices [S] int16: 1 where x, and where y, is negative."""
    negative = (points < 0).to(torch.int16)
    return (negative[:, 0] << (index_bits - 2)) | (negative[:, 1] << (index_bits - 1))


@functools.lru_cache(maxsize=16)
def grid(index_bits: int, device: torch.device) -> Grid:
    """The grid of a codebook, on ``device``; cached, treat it as read-only."""
    quadrant = load_quadrant(index_bits)
    cells, table = 1, torch.arange(len(quadrant))[None]
    while cells < 128 or cells < 8 * len(quadrant) ** 0.5:
        # split every cell in four, then strike off again
        cells *= 2
        table = table.view(cells // 2, 1, cells // 2, 1, -1)
        table = table.expand(-1, 2, -1, 2, -1).reshape(cells * cells, -1)
        table = _strike_off(table, quadrant.double(), cells)
    only = torch.where((table == table[:, :1]).all(1), table[:, 0], -1)
    candidates = table.T.contiguous()
    return Grid(
        cells,
        only.to(device, torch.int16),
        candidates.to(device, torch.int16),
        quadrant.to(device),
    )


def _strike_off(table: torch.Tensor, codewords: torch.Tensor, cells: int) -> torch.Tensor:
    """Drop the candidates [cells**2, L] that cannot win anywhere in their cell.

    L shrinks to the longest list left.
    """
    side = _REACH / cells
    at = torch.arange(cells * cells)
    low = torch.stack((at // cells, at % cells), 1).float() * side  # [cells**2, 2]
    # [cells**2, 4, 2]
    corners = low[:, None] + low.new_tensor([[0, 0], [0, side], [side, 0], [side, side]])
    # [cells**2, 4, L]
    distance = (corners[:, :, None].double() - codewords[table][:, None]).square().sum(3)
    champion = distance.amax(1).argmin(1)[:, None, None].expand(-1, 4, 1)
    struck = (distance.gather(2, champion) + _MARGIN < distance).all(1)
    if table.shape[1] <= 32:  # all pairs
        struck |= (distance[..., None] + _MARGIN < distance[..., None, :]).all(1).any(1)
    length = int((~struck).sum(1).max())
    end = len(codewords)
    kept = table.masked_fill(struck, end).sort(1).values[:, :length]
    # Pad by repeating the last real candidate; repetitions of earlier lists collapse here too.
    repeated = torch.zeros_like(kept, dtype=torch.bool)
    repeated[:, 1:] = kept[:, 1:] == kept[:, :-1]
    kept = kept.masked_fill(repeated, end).sort(1).values
    last = kept.masked_fill(kept == end, -1).amax(1, keepdim=True)
    kept = torch.where(kept == end, last, kept)
    length = int((kept[:, 1:] != kept[:, :-1]).sum(1).max()) + 1
    return kept[:, :length]


def nearest(points: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Index of the codeword nearest to every point.

    Where two codewords of its quadrant are equally near, the lower index.

    Args:
        points: [S, 2] float32, finite.
    Returns:
        [S] int16 (indices are below 4096). Equal to :func:`nearest_brute_force`, bit for bit.
    """
    of_codebook = grid(index_bits, points.device)
    out = torch.empty(len(points), dtype=torch.int16, device=points.device)
    for i in range(0, len(points), CHUNK):
        out[i : i + CHUNK] = _nearest_chunk(points[i : i + CHUNK], index_bits, of_codebook)
    return out


def _nearest_chunk(points: torch.Tensor, index_bits: int, grid: Grid) -> torch.Tensor:
    x, y = points[:, 0].contiguous(), points[:, 1].contiguous()
    x, y = x.abs(), y.abs()
    scale = grid.cells / _REACH
    outside = (torch.maximum(x, y) >= _REACH).nonzero()[:, 0]
    column = (x * scale).clamp_(max=grid.cells - 1).to(torch.int32)
    row = (y * scale).clamp_(max=grid.cells - 1).to(torch.int32)
    cell = column * grid.cells + row
    indices = grid.only.index_select(0, cell)
    contested = (indices < 0).nonzero()[:, 0]
    indices[contested] = _best_candidate(x[contested], y[contested], cell[contested], grid)
    indices |= _signs(points, index_bits)
    if len(outside):
        indices[outside] = nearest_brute_force(points[outside], index_bits)
    return indices


def _best_candidate(
    x: torch.Tensor,
    y: torch.Tensor,
    cell: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Quadrant row of the nearest candidate of each point's cell; of equally near ones the lowest.

    Candidates ascend, so the first of the nearest is the lowest.
    """
    best = torch.empty_like(cell, dtype=torch.int16)
    best_distance = torch.full_like(x, torch.inf)
    for candidates in grid.candidates:
        candidate = candidates.index_select(0, cell)
        at = candidate.int()
        distance = (x - grid.quadrant[:, 0].index_select(0, at)).square_()
        distance += (y - grid.quadrant[:, 1].index_select(0, at)).square_()
        best = torch.where(distance < best_distance, candidate, best)
        best_distance = torch.minimum(distance, best_distance)
    return best
