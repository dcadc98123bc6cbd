"""From the weights of one input group to quantised weights: choose the channel scales, then code every pair."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from offline_quantize.encoding.feedback import DAMPING, encode_with_feedback, factor, feedback_matrix
from qamw_kernels.codec.encode import ENCODE_CHUNK, QuantizedWeight, decode_weight, encode_weight, make_input_scales
from qamw_kernels.codec.rotation import rotate

ENCODERS = ("feedback", "nearest")
EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SEARCH_ROWS = 128  # of every weight: the exponent is chosen on these
MEASURED_ROWS = 1024  # decoded at once
FLOOR = 1e-3  # of the mean: channels that hardly count keep a finite scale
FEEDBACK_WEIGHTS = 1 << 24  # encoded at once, with feedback


@dataclass
class EncodedGroup:
    """The quantised weights of an input group and how well they stand for the originals.

    Attributes:
        quantized: by module name.
        errors: by module name: "nmse" of the weight and, with calibration, "output_nmse" of the layer's output.
    """

    quantized: dict[str, QuantizedWeight]
    errors: dict[str, dict[str, float]]


def channel_scales(magnitudes: torch.Tensor, exponent: float) -> torch.Tensor:
    """Factors [K] float32 with geometric mean 1: magnitudes ** exponent, for magnitudes [K] that are not negative."""
    if not magnitudes.any():
        return torch.ones_like(magnitudes)
    scales = magnitudes.clamp_min(FLOOR * float(magnitudes.mean())) ** exponent
    return scales / scales.log().mean().exp()


def _output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean squared norm of weight [N, K] times the input that ``hessian`` [K, K] is the second moment of."""
    return float(torch.linalg.vecdot(weight @ hessian, weight).sum())


def measure(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor | None) -> dict[str, float]:
    """Squared errors of a quantised weight, relative to the squared originals: of the weight, and of the layer's output."""
    error = energy = output_error = output_energy = 0.0
    for start in range(0, len(weight), MEASURED_ROWS):
        part = slice(start, start + MEASURED_ROWS)
        original = weight[part].float()
        difference = decode_weight(quantized.rows(part)) - original
        error, energy = error + float(difference.square().sum()), energy + float(original.square().sum())
        if hessian is not None:
            output_error += _output_energy(difference, hessian)
            output_energy += _output_energy(original, hessian)
    measured = {"nmse": error / (energy or 1.0)}
    return measured if hessian is None else measured | {"output_nmse": output_error / (output_energy or 1.0)}


def _searched_scales(weights: dict[str, torch.Tensor], index_bits: int, rotation_block_size: int,
                     hessians: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
    """Input scales for nearest codewords: rms(x) ** exponent with the least output error, on some rows of every weight."""
    known = {name: hessian for name, hessian in hessians.items() if hessian is not None}
    rows = {name: weights[name][:: max(1, len(weights[name]) // SEARCH_ROWS)][:SEARCH_ROWS].float() for name in known}
    rms = torch.stack([*{id(hessian): hessian.diagonal() for hessian in known.values()}.values()]).mean(0).sqrt()

    def error(scales: torch.Tensor) -> float:
        return sum(measure(w, encode_weight(w, index_bits, rotation_block_size, scales), known[name])["output_nmse"]
                   for name, w in rows.items())

    return min((make_input_scales(len(rms), channel_scales(rms, exponent)) for exponent in EXPONENTS), key=error)


def _balanced_scales(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Input scales for error feedback, which knows the activation from the Hessian: they even out the weights' columns.

    With feedback, the error is the same in every coordinate of a row, whatever the activation is, and grows with the row's
    norm; scales of a given product make the norm least where all columns are alike.
    """
    energies = [w.float().square().sum(0) for w in weights.values()]
    columns = torch.stack([e / e.sum().clamp_min(torch.finfo(torch.float32).tiny) for e in energies]).sum(0)
    return make_input_scales(len(columns), channel_scales(columns, -0.25))


def _feedback_coder(hessian: torch.Tensor, input_scales: torch.Tensor, index_bits: int,
                    rotation_block_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Codes coordinates [n, K] as indices [n, P], with error feedback; ``hessian`` [K, K] is that of the unrotated input."""
    scales = input_scales.to(hessian.device).double()
    basis = hessian.double() * scales[:, None] * scales
    for _ in range(2):
        basis = rotate(basis, rotation_block_size).T
    feedback = feedback_matrix(factor(basis, DAMPING))
    return lambda coordinates: encode_with_feedback(coordinates, feedback, index_bits)


def encode_group(weights: dict[str, torch.Tensor], index_bits: int, rotation_block_size: int,
                 hessians: Mapping[str, torch.Tensor | None], encoder: str) -> EncodedGroup:
    """Quantise the weights that read one activation, or one activation of every expert: they share the input scales.

    Args:
        weights: module name -> [N, K]; all on one device, with the same K.
        hessians: module name -> [K, K] float32, mean of x^T x over what it reads, the same tensor where that is the same; None where
            nothing is known of it, then codewords are the nearest.
        encoder: one of ENCODERS.
    """
    if all(hessian is None for hessian in hessians.values()):
        scales = make_input_scales(next(iter(weights.values())).shape[1])
    elif encoder == "nearest":
        scales = _searched_scales(weights, index_bits, rotation_block_size, hessians)
    else:
        scales = _balanced_scales(weights)
    quantized, errors = {}, {}
    coder, coder_hessian = None, None
    for name, weight in weights.items():
        hessian = hessians[name]
        if encoder == "feedback" and hessian is not coder_hessian:  # a factor is large: one at a time
            coder = None if hessian is None else _feedback_coder(hessian, scales, index_bits, rotation_block_size)
            coder_hessian = hessian
        weights_at_once = FEEDBACK_WEIGHTS if coder else ENCODE_CHUNK
        quantized[name] = encode_weight(weight, index_bits, rotation_block_size, scales, f"{name}.weight", coder, weights_at_once)
        errors[name] = measure(weight, quantized[name], hessian)
    return EncodedGroup(quantized, errors)
