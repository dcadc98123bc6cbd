"""Input scales of an input group: rotation signs divided by channel scales.

Nearest codewords have activation-aware channel scales (:func:`searched_scales`). Error feedback
knows the activations from the Hessian, and has scales that balance the weights instead
(:func:`balanced_scales`).
"""

from collections.abc import Callable, Iterable

import torch

from qamw_kernels.codec.encode import make_input_scales

EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
FLOOR = 1e-3  # of the mean: keeps the scales of nearly unused channels finite


def channel_scales(magnitudes: torch.Tensor, exponent: float) -> torch.Tensor:
    """Factors [K] float32 with geometric mean 1: magnitudes ** exponent.

    Args:
        magnitudes: [K] float32, not negative.
    """
    if not magnitudes.any():
        return torch.ones_like(magnitudes)
    scales = magnitudes.clamp_min(FLOOR * float(magnitudes.mean())) ** exponent
    return scales / scales.log().mean().exp()


def searched_scales(
    magnitudes: torch.Tensor, output_error: Callable[[torch.Tensor], float]
) -> torch.Tensor:
    """Input scales [K] float16 for nearest codewords: those with the least output error.

    Args:
        magnitudes: root mean square of every channel of the activation, [K] float32.
        output_error: input scales [K] -> error of the layers' outputs when encoded with them.
    """
    candidates = (
        make_input_scales(len(magnitudes), channel_scales(magnitudes, exponent))
        for exponent in EXPONENTS
    )
    return min(candidates, key=output_error)


def balanced_scales(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Input scales [K] float16 for error feedback: they even out the columns of the weights.

    They ignore the activation, which feedback knows from the Hessian. With feedback, the error is
    the same in every coordinate of a row, whatever the activation is, and grows with the row's
    norm. Among scales with the same product, that norm is least where all columns are alike; these
    scales go half of the way there.

    Args:
        weights: [N, K] each, with the same K.
    """
    energies = [w.float().square().sum(0) for w in weights]
    tiny = torch.finfo(torch.float32).tiny
    columns = torch.stack([e / e.sum().clamp_min(tiny) for e in energies]).sum(0)
    return make_input_scales(len(columns), channel_scales(columns, -0.25))
