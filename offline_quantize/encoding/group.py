"""The weights of one input group become quantized weights. How data flows:

1. Weights and Hessians -> input scales, one vector for the group (:mod:`.scales`).
2. Hessian and input scales -> a coder (:func:`.feedback.feedback_coder`): a function from
   coordinates to indices. Without a Hessian there is none.
3. ``qamw_kernels``' ``encode_weight`` scales, normalizes and rotates some rows of a weight at a
   time, has the coder choose their indices (or takes the nearest codewords), and packs them.
4. The quantized weight is decoded again and compared with the original (:func:`measure`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from offline_quantize.encoding.feedback import feedback_coder
from offline_quantize.encoding.scales import balanced_scales, searched_scales
from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import ENCODE_CHUNK, encode_weight, make_input_scales
from qamw_kernels.format.weight import QuantizedWeight

ENCODERS = ("feedback", "nearest")
SEARCH_ROWS = 128  # of every weight: nearest codewords' scales are chosen on these
MEASURED_ROWS = 1024  # decoded at once
FEEDBACK_WEIGHTS = 1 << 24  # encoded at once, with feedback


@dataclass(frozen=True)
class Errors:
    """Squared errors of a quantized weight, relative to the squared originals.

    Attributes:
        nmse: of the weight.
        output_nmse: of the layer's output; None where nothing is known of its input.
    """

    nmse: float
    output_nmse: float | None


@dataclass(frozen=True)
class EncodedGroup:
    """The quantized weights of an input group, and their errors, by module name."""

    quantized: dict[str, QuantizedWeight]
    errors: dict[str, Errors]


def _output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean squared norm of weight [N, K] times the input whose second moment is ``hessian``."""
    return float(torch.linalg.vecdot(weight @ hessian, weight).sum())


def measure(
    weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor | None
) -> Errors:
    """Errors of a quantized weight.

    Args:
        weight: the original [N, K].
        hessian: second moment [K, K] float32 of its input, None where nothing is known of it.
    """
    error = energy = output_error = output_energy = 0.0
    for start in range(0, len(weight), MEASURED_ROWS):
        part = slice(start, start + MEASURED_ROWS)
        original = weight[part].float()
        difference = decode_weight(quantized.rows(part)) - original
        error += float(difference.square().sum())
        energy += float(original.square().sum())
        if hessian is not None:
            output_error += _output_energy(difference, hessian)
            output_energy += _output_energy(original, hessian)
    nmse = error / (energy or 1.0)
    return Errors(nmse, None if hessian is None else output_error / (output_energy or 1.0))


def _scales_for_nearest(
    weights: dict[str, torch.Tensor],
    index_bits: int,
    rotation_block_size: int,
    hessians: Mapping[str, torch.Tensor | None],
) -> torch.Tensor:
    """Input scales with the least output error of nearest codewords, on some rows of each weight.

    At least one Hessian is known.
    """
    known = {name: hessian for name, hessian in hessians.items() if hessian is not None}
    rows = {}
    for name in known:
        step = max(1, len(weights[name]) // SEARCH_ROWS)
        rows[name] = weights[name][::step][:SEARCH_ROWS].float()
    activations = {id(hessian): hessian.diagonal() for hessian in known.values()}
    magnitudes = torch.stack([*activations.values()]).mean(0).sqrt()

    def output_error(scales: torch.Tensor) -> float:
        total = 0.0
        for name, weight in rows.items():
            quantized = encode_weight(weight, index_bits, rotation_block_size, scales)
            total += measure(weight, quantized, known[name]).output_nmse or 0.0
        return total

    return searched_scales(magnitudes, output_error)


def encode_group(
    weights: dict[str, torch.Tensor],
    index_bits: int,
    rotation_block_size: int,
    hessians: Mapping[str, torch.Tensor | None],
    encoder: str,
    balance: bool = True,
) -> EncodedGroup:
    """Quantize the weights of an input group, which share input scales.

    Args:
        weights: module name -> [N, K]; all on one device, with the same K.
        hessians: module name -> [K, K] float32, mean of x^T x over what the module reads; the same
            tensor where modules read the same. None where nothing is known of it: codewords are the
            nearest there.
        encoder: one of ENCODERS.
        balance: whether error feedback has channel scales, :func:`balanced_scales`.
    Raises:
        TensorError: a weight is not finite, or a Hessian is not.
    """
    known = any(hessian is not None for hessian in hessians.values())
    if known and encoder == "nearest":
        scales = _scales_for_nearest(weights, index_bits, rotation_block_size, hessians)
    elif known and balance:
        scales = balanced_scales(weights.values())
    else:
        scales = make_input_scales(next(iter(weights.values())).shape[1])
    quantized, errors = {}, {}
    coder: Callable[[torch.Tensor], torch.Tensor] | None = None
    coder_hessian = None
    for name, weight in weights.items():
        hessian = hessians[name]
        if encoder == "feedback" and hessian is not coder_hessian:
            coder = None  # a coder is large: one at a time
            if hessian is not None:
                coder = feedback_coder(hessian, scales, index_bits, rotation_block_size)
            coder_hessian = hessian
        quantized[name] = encode_weight(
            weight,
            index_bits,
            rotation_block_size,
            scales,
            name=f"{name}.weight",
            coder=coder,
            weights_at_once=FEEDBACK_WEIGHTS if coder else ENCODE_CHUNK,
        )
        errors[name] = measure(weight, quantized[name], hessian)
    return EncodedGroup(quantized, errors)
