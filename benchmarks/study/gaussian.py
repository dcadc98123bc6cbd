"""Scalar Lloyd-Max and polar coding of the coordinates that QAM-W's 2D codebook codes.

Both are made for the unit Gaussian. The tables are Lloyd-Max fits from closed integrals, by
fixed-point and Newton iteration in float64, the same every time.
"""

import functools
import math
from collections.abc import Callable

import torch

from qamw_kernels.codec.encode import make_input_scales, row_factors, to_coordinates
from qamw_kernels.codec.rotation import unrotate

FAR = 40.0  # no mass beyond it in float64

Integrals = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""x -> integrals of a density p and of x p up to x."""


def gaussian_integrals(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrals of p and x p of the unit normal up to ``x``."""
    return torch.special.ndtr(x), -torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def rayleigh_integrals(r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrals of p and r p of the unit Rayleigh up to ``r``.

    It is the distribution of the radius of a unit circular Gaussian.
    """
    tail = torch.exp(-r.square() / 2)
    return -tail, math.sqrt(math.pi / 2) * torch.erf(r / math.sqrt(2)) - r * tail


def lloyd_max(
    start: torch.Tensor,
    low: float,
    integrals: Integrals,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points that are the means of their nearest-point cells.

    Args:
        start: [L], where the iteration begins.
        low: the lower end of the distribution.
    Returns:
        The points [L] and the masses [L] of their cells, float64.
    """
    ends = torch.tensor([low, FAR], dtype=torch.float64)

    def cells(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        edges = torch.cat((ends[:1], (points[1:] + points[:-1]) / 2, ends[1:]))
        mass, moment = (integral.diff() for integral in integrals(edges))
        return moment / mass, mass

    points = start.double()
    for _ in range(500):
        points = cells(points)[0]
    identity = torch.eye(len(points), dtype=torch.float64)
    for _ in range(8):  # Newton, because the plain iteration becomes slow near the end
        slope = torch.autograd.functional.jacobian(lambda x: cells(x)[0], points)
        points = points + torch.linalg.solve(identity - slope, cells(points)[0] - points)
    return cells(points)


@functools.cache
def scalar_table(bits: int) -> tuple[torch.Tensor, float]:
    """Lloyd-Max points [2**bits] of the unit normal, and their mean squared error."""
    points, mass = lloyd_max(torch.linspace(-3, 3, 2**bits), -FAR, gaussian_integrals)
    return points, 1 - float((mass * points.square()).sum())


@functools.cache
def rings(amplitude_bits: int) -> tuple[torch.Tensor, float]:
    """Lloyd-Max radii [2**amplitude_bits] of the unit Rayleigh, and their mean square."""
    start = torch.linspace(0.2, 4, 2**amplitude_bits) if amplitude_bits else torch.ones(1)
    radii, mass = lloyd_max(start, 0, rayleigh_integrals)
    return radii, float((mass * radii.square()).sum())


def polar_nmse(index_bits: int, amplitude_bits: int) -> float:
    """Error per coordinate of polar coding: rings, and uniform phases of a pair's other bits.

    A cell is a sector of a ring. Its centroid lies at the ring's mean radius times sin(h) / h,
    where h is half the sector's angle. With that shrinkage the radius between two rings is still
    midway between their means, so the rings do not depend on the phases.
    """
    return 1 - shrinkage(index_bits - amplitude_bits) ** 2 * rings(amplitude_bits)[1] / 2


def shrinkage(phase_bits: int) -> float:
    """Mean cosine of the angle to the middle of one of 2**phase_bits sectors of the circle."""
    half = math.pi / 2**phase_bits
    return math.sin(half) / half


def best_amplitude_bits(index_bits: int) -> int:
    """How many of a pair's bits are best spent on the amplitude.

    The widest sector that is tried is a quarter circle.
    """
    return min(range(min(7, index_bits - 1)), key=lambda bits: polar_nmse(index_bits, bits))


def code_scalar(coordinates: torch.Tensor, bits: int) -> torch.Tensor:
    """Every coordinate's nearest point, any shape."""
    points = scalar_table(bits)[0].half().float()  # as stored
    return points[torch.bucketize(coordinates, (points[1:] + points[:-1]) / 2)]


def code_polar(coordinates: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Every adjacent pair's cell centroid: nearest ring, nearest phase; coordinates [N, K]."""
    amplitude_bits = best_amplitude_bits(index_bits)
    radii, phases = rings(amplitude_bits)[0].float(), 2 ** (index_bits - amplitude_bits)
    stored = (radii * shrinkage(index_bits - amplitude_bits)).half().float()
    x, y = coordinates.unflatten(-1, (-1, 2)).unbind(-1)
    amplitude = stored[torch.bucketize(torch.hypot(x, y), (radii[1:] + radii[:-1]) / 2)]
    angle = (torch.atan2(y, x) * (phases / (2 * math.pi))).round() * (2 * math.pi / phases)
    return torch.stack((amplitude * angle.cos(), amplitude * angle.sin()), -1).flatten(-2)


def code_rotated(
    weight: torch.Tensor,
    rotation_block_size: int,
    code: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """QAM-W without calibration, with another code in place of its codebook.

    Args:
        weight: [N, K] float32.
        code: coordinates [N, K] -> decoded coordinates.
    Returns:
        The decoded weight [N, K] float32.
    """
    input_scales = make_input_scales(weight.shape[1])
    coordinates, row_norms = to_coordinates(weight, rotation_block_size, input_scales)
    factors = row_factors(coordinates, code)[:, None]
    decoded = unrotate(code(coordinates / factors), rotation_block_size)
    return decoded * factors * row_norms[:, None] * input_scales.float()
