"""Fit the shipped codebooks: ``python -m tools.fit_codebooks OUT.safetensors``.

Lloyd-Max for the unit circular Gaussian, restricted to quadrant symmetry: only the positive
quadrant is fitted (the nearest codeword of a point never lies in another quadrant), and the signs
of x and y become two index bits.

The integrals of Lloyd's iteration are sums over a fixed scrambled-Sobol point set. Its points are
drawn from a Gaussian of variance 2, the optimal density of codewords at high rate (p^(1/2)), and
weighted back to the unit Gaussian, so that inner and outer cells are integrated equally well.
Everything is seeded; the best of several starts is kept, then rounded to bfloat16, which is exact
in float16 and float32 too.
"""

import argparse
import math

import torch
from safetensors.torch import save_file

from qamw_kernels.format.codebook import INDEX_BITS, codebook_name

NEIGHBORS = 12
"""A point's owner moves little per iteration: only this many codewords next to the previous owner
are looked at."""

FULL_SEARCH_EVERY = 25
"""Iterations from one exhaustive search to the next."""


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
        tensors[codebook_name(index_bits)] = quadrant.bfloat16()
        sqnr = -10 * math.log10(error)
        print(f"C = {2**index_bits:5d}  NMSE {error:.6f}  SQNR {sqnr:.2f} dB", flush=True)
    save_file(tensors, args.out)


if __name__ == "__main__":
    main()
