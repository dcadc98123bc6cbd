"""Fit the shipped codebooks: ``python -m tools.fit_codebooks OUT.safetensors``.

The plain code: Lloyd-Max for the unit circular Gaussian, restricted to quadrant symmetry: only the
positive quadrant is fitted (the nearest codeword of a point never lies in another quadrant), and
the signs of x and y become two index bits.

The integrals of Lloyd's iteration are sums over a fixed scrambled-Sobol point set. Its points are
drawn from a Gaussian of variance 2, the optimal density of codewords at high rate (p^(1/2)), and
weighted back to the unit Gaussian, so that inner and outer cells are integrated equally well.
The best of several starts is kept.

The trellis is fitted with its encoder, which codes random units of the Gaussian: in every round,
each entry becomes the mean of the points that are coded as it. Each round has new units, and the
sums of earlier rounds fade slowly, so that entries do not fit the randomness of single rounds.

Everything is seeded, and rounded to bfloat16 at the end, which is exact in float16 and float32 too.
"""

import argparse
import math

import torch
from safetensors.torch import save_file

from qamw_kernels.codec.nearest import make_grid
from qamw_kernels.codec.trellis import best_paths, codebook_rows
from qamw_kernels.format.codebook import INDEX_BITS, PLAIN, TRELLIS, codebook_name, flip_signs
from qamw_kernels.format.packing import UNIT_INPUTS

NEIGHBORS = 12
"""A point's owner moves little per iteration: only this many codewords next to the previous owner
are looked at."""

FULL_SEARCH_EVERY = 25
"""Iterations from one exhaustive search to the next."""

FADE = 0.85
"""The weight of the sums of a round in the next one."""

SPREAD = 1.8
"""Variance of the entries that a fit of the trellis begins with."""


def quadrature(num_points: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights that integrate against the unit circular Gaussian.

    Returns:
        points [S, 2] of the positive quadrant, and weights [S] of sum 1; float32.
    """
    engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)
    uniform = engine.draw(num_points, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    points = math.sqrt(2) * torch.special.ndtri(0.5 + 0.5 * uniform)
    weights = torch.exp(-0.25 * points.square().sum(1))  # p_1 / p_2 up to a constant
    return points.float(), (weights / weights.sum()).float()


def nearest_of_all(points: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """Owner [S] of every point, by exhaustive search."""
    return torch.cat([torch.cdist(chunk, codewords).argmin(1) for chunk in points.split(1 << 15)])


def nearest_of_neighbors(
    points: torch.Tensor,
    codewords: torch.Tensor,
    owner: torch.Tensor,
) -> torch.Tensor:
    """Owner [S] of every point, among the codewords nearest to its previous owner."""
    distances = torch.cdist(codewords, codewords)
    neighbors = distances.topk(min(NEIGHBORS, len(codewords)), largest=False).indices
    out = torch.empty_like(owner)
    step = 1 << 17
    for i in range(0, len(points), step):
        candidates = neighbors[owner[i : i + step]]  # [s, NEIGHBORS]
        distance = (codewords[candidates] - points[i : i + step, None]).square().sum(2)
        out[i : i + step] = candidates.gather(1, distance.argmin(1, keepdim=True))[:, 0]
    return out


def nmse(
    points: torch.Tensor,
    weights: torch.Tensor,
    codewords: torch.Tensor,
    owner: torch.Tensor,
) -> float:
    """Distortion per coordinate, relative to the unit variance of the source."""
    errors = (points - codewords[owner]).double().square().sum(1)
    return float((weights.double() * errors).sum() / 2)


def lloyd(
    codewords: torch.Tensor,
    points: torch.Tensor,
    weights: torch.Tensor,
    iterations: int,
) -> torch.Tensor:
    """Lloyd's iteration with over-relaxation (tapering to none), from codewords [C/4, 2]."""
    owner = nearest_of_all(points, codewords)
    weighted = points * weights[:, None]
    for i in range(iterations):
        mass = torch.zeros(len(codewords)).index_add_(0, owner, weights)
        moment = torch.zeros_like(codewords).index_add_(0, owner, weighted)
        mean = moment / mass[:, None].clamp_min(1e-30)
        centroid = torch.where(mass[:, None] > 0, mean, codewords)
        relaxation = 1.0 + 0.8 * max(0.0, 1 - i / (0.8 * iterations))
        codewords = (codewords + relaxation * (centroid - codewords)).clamp_min(1e-3)
        if i % FULL_SEARCH_EVERY == 0:
            owner = nearest_of_all(points, codewords)
        else:
            owner = nearest_of_neighbors(points, codewords, owner)
    return codewords


def fit(
    index_bits: int,
    starts: int,
    iterations: int,
    num_points: int,
    seed: int = 0,
) -> tuple[torch.Tensor, float]:
    """The positive quadrant of a codebook, and its distortion.

    Returns:
        quadrant [2**index_bits / 4, 2] float32, sorted by (x, y), and its :func:`nmse`.
    """
    size = 2**index_bits // 4
    points, weights = quadrature(num_points, seed)
    best, best_nmse = torch.empty(0), math.inf
    for start in range(starts):
        codewords, _ = quadrature(size, seed=1000 * (seed + 1) + start)
        codewords = lloyd(codewords, points, weights, iterations)
        codewords = codewords.bfloat16().float()
        error = nmse(points, weights, codewords, nearest_of_all(points, codewords))
        if error < best_nmse:
            best, best_nmse = codewords, error
    order = sorted(range(size), key=lambda i: best[i].tolist())
    return best[order], best_nmse


def lattice(index_bits: int) -> torch.Tensor:
    """Entries of the trellis before a fit [2**index_bits / 2, 2] float32, as many in each quadrant.

    They are the points closest to the origin of a lattice with the coordinates 4 j + 1, up to a
    factor; sign flips make the lattices of the other three classes from it (-1, 3 ...). Their radii
    are companded to a Gaussian of variance SPREAD: where a circle through a point holds the part
    r^2 / R^2 of the area of all points, the new circle holds the same part of the Gaussian's mass.
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


def fit_trellis(index_bits: int, rounds: int, units: int) -> tuple[torch.Tensor, float]:
    """The entries of a trellis, and their distortion on units that they were not fitted to.

    Returns:
        entries [2**index_bits / 2, 2] float32, sorted by (x, y), and the mean squared error.
    """
    entries = lattice(index_bits)
    sums = torch.zeros_like(entries, dtype=torch.float64)
    counts = torch.zeros(len(entries), 1, dtype=torch.float64)
    for seed in range(1, rounds + 1):
        points, numbers, signs = code_units(entries, units, seed)
        points = (points * signs).double()  # as if of class 0
        sums = (FADE * sums).index_add_(0, numbers, points)
        counts = FADE * counts + torch.bincount(numbers, minlength=len(entries))[:, None]
        entries = torch.where(counts > 0, sums / counts, entries.double()).float()
    entries = entries.bfloat16().float()
    order = sorted(range(len(entries)), key=lambda i: entries[i].tolist())
    entries = entries[order]
    points, numbers, signs = code_units(entries, units, rounds + 1)
    return entries, float((points - signs * entries[numbers]).double().square().mean())


def code_units(
    entries: torch.Tensor, units: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of the Gaussian, coded along a trellis with ``entries`` [E, 2].

    Returns:
        the points [S, 2], the numbers [S] of their entries, and the signs [S, 2] that flip these.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(units, UNIT_INPUTS, generator=generator)
    indices = best_paths(rows, make_grid(entries, TRELLIS, rows.device))
    found = codebook_rows(indices, len(entries).bit_length()).flatten().long()
    signs = flip_signs(torch.ones(1, 2))[found // len(entries)]
    return rows.view(-1, 2), found % len(entries), signs


def report(size: int, error: float) -> None:
    print(f"{size:5d} indices  NMSE {error:.6f}  SQNR {-10 * math.log10(error):.2f} dB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", help="safetensors file to write")
    args = parser.parse_args()
    tensors = {}
    for index_bits in INDEX_BITS:
        # Small codebooks differ in their topology from start to start, large ones hardly. 1024
        # points per codeword keep the fit from adapting to the point set (a bias of about 0.1 % of
        # the distortion).
        quadrant, error = fit(
            index_bits,
            starts=max(2, 2 ** (11 - index_bits)),
            iterations=200,
            num_points=2 ** (index_bits + 8),
        )
        tensors[codebook_name(index_bits, PLAIN)] = quadrant.bfloat16()
        report(2**index_bits, error)
    for index_bits in INDEX_BITS:
        entries, error = fit_trellis(index_bits, rounds=48, units=2 ** (max(index_bits, 9) + 4))
        tensors[codebook_name(index_bits, TRELLIS)] = entries.bfloat16()
        report(2**index_bits, error)
    save_file(tensors, args.out)


if __name__ == "__main__":
    main()
