"""Integer methods: round to nearest, SmoothQuant (arXiv 2211.10438) and GPTQ (arXiv 2210.17323)."""

import torch
from torch import nn

SMALLEST_SCALE = 2.0**-24  # of float16


def grid(weights: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The integer grid of every row's group.

    An asymmetric grid reaches from the smallest to the largest value and holds 0. A symmetric one
    has a fixed zero point, and the largest magnitude lies half a step outside, as in
    compressed-tensors.

    Args:
        weights: [N, G] float32, one group of every row.
    Returns:
        scales [N, 1], float16 values in float32, and zero points [N, 1].
    """
    if symmetric:
        high = weights.abs().amax(1, keepdim=True)
        low = -high
    else:
        low = weights.amin(1, keepdim=True).clamp_max(0)
        high = weights.amax(1, keepdim=True).clamp_min(0)
    scales = ((high - low) / (2**bits - 1)).half().float().clamp_min(SMALLEST_SCALE)
    if symmetric:
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    return scales, (-low / scales).round().clamp(0, 2**bits - 1)


def to_grid(
    weights: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """The grid's value nearest to every weight, shapes [N, G] and [N, 1]."""
    return (((weights / scales).round() + zeros).clamp(0, 2**bits - 1) - zeros) * scales


def round_to_nearest(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """Round a weight [N, K] float32; every ``group`` inputs of a row have a grid of their own.

    The last group may be smaller.
    """
    parts = weight.split(group, 1)
    return torch.cat([to_grid(part, *grid(part, bits, symmetric), bits) for part in parts], 1)


def grouped_bits(num_inputs: int, bits: int, group: int, symmetric: bool) -> float:
    """Stored bits of one row: codes, 16 bits of scale and, if asymmetric, as many as a code."""
    num_groups = -(-num_inputs // group)
    return num_inputs * bits + num_groups * (16 if symmetric else 16 + bits)


def int8_per_channel(weight: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes [N, K] from -127 to 127 and float16 scales [N, 1], both in float32."""
    top = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax(1, keepdim=True) / top).half().float().clamp_min(SMALLEST_SCALE)
    return (weight / scales).round().clamp(-top, top), scales


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    damping: float = 0.01,
) -> torch.Tensor:
    """GPTQ as published, with the inputs in their own order.

    A group's grid is chosen when the group is reached; its errors are passed to all later inputs.

    Args:
        weight: [N, K] float32.
        hessian: [K, K], sum of outer products of the inputs.
        damping: added to the diagonal, relative to its mean.
    Returns:
        [N, K] float32 on grids of ``group`` inputs, the last of which may be smaller.
    """
    weight, hessian = weight.clone(), hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)  # hessian^-1 = factor^T factor
    for start in range(0, weight.shape[1], group):
        block = weight[:, start : start + group]
        end = start + block.shape[1]
        scales, zeros = grid(block, bits, symmetric)
        errors = torch.empty_like(block)
        for i in range(block.shape[1]):
            row = factor[start + i, start + i : end]
            value = to_grid(block[:, i : i + 1], scales, zeros, bits)
            errors[:, i : i + 1] = (block[:, i : i + 1] - value) / row[0]
            block[:, i:] -= errors[:, i : i + 1] * row
            block[:, i : i + 1] = value
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def smoothing_factors(
    largest_inputs: torch.Tensor,
    weights: list[torch.Tensor],
    alpha: float = 0.5,
) -> torch.Tensor:
    """SmoothQuant's factors [K], float16 values: inputs are divided by them, weights multiplied.

    Args:
        largest_inputs: [K], the largest magnitude of every input.
        weights: [N, K] each, of all linears that read the inputs.
    """
    inputs = largest_inputs.clamp_min(1e-5)
    largest_weights = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp_min(1e-5)
    factors = inputs**alpha / largest_weights ** (1 - alpha)
    return factors.clamp(2.0**-14, 65504).half().float()


class SmoothedLinear(nn.Module):
    """W8A8 with integer arithmetic in float32.

    Weights have a scale per output channel; inputs have one per token, computed at run time.

    Args:
        factors: [K], what the inputs are divided by.
        bits: of weights and inputs.
    """

    def __init__(self, linear: nn.Linear, factors: torch.Tensor, bits: int = 8) -> None:
        super().__init__()
        self.codes, self.scales = int8_per_channel(linear.weight.float() * factors, bits)
        self.factors, self.bias, self.bits = factors, linear.bias, bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N] in the dtype of x."""
        smooth = (x.float() / self.factors).flatten(0, -2)
        codes, scales = int8_per_channel(smooth, self.bits)
        y = (codes @ self.codes.T * scales * self.scales.T).unflatten(0, x.shape[:-1])
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
