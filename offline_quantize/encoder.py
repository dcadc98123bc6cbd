"""From the weights of one input group to quantised weights: choose the channel scales, then code every pair."""

from dataclasses import dataclass

import torch

from offline_quantize.calibration import InputStatistics
from qamw_kernels.codebook import load_codebook
from qamw_kernels.codec import QuantizedWeight, decode_weight, encode_weight, make_input_scales, to_coordinates
from qamw_kernels.nearest import nearest
from qamw_kernels.rotation import rotate

EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SEARCH_ROWS = 128  # of every weight: the exponent is chosen on these
MEASURED_ROWS = 1024  # decoded at once
RMS_FLOOR = 1e-3  # of the mean: channels that hardly fire keep a finite scale


@dataclass
class EncodedGroup:
    """The quantised weights of an input group and how well they stand for the originals.

    Attributes:
        quantized: by module name.
        exponent: channel scales are rms(x) ** exponent; None without calibration.
        errors: by module name: "nmse" of the weight and, with calibration, "output_nmse" of the layer's output.
    """

    quantized: dict[str, QuantizedWeight]
    exponent: float | None
    errors: dict[str, dict[str, float]]


def channel_scales(rms: torch.Tensor, exponent: float) -> torch.Tensor:
    """Activation-aware factors [K] float32 with geometric mean 1: rms(x) ** exponent."""
    if not rms.any():
        return torch.ones_like(rms)
    scales = rms.clamp_min(RMS_FLOOR * float(rms.mean())) ** exponent
    return scales / scales.log().mean().exp()


def measure(weight: torch.Tensor, quantized: QuantizedWeight, sample: torch.Tensor | None) -> dict[str, float]:
    """Squared errors of a quantised weight, relative to the squared originals: of the weight, and of its output on ``sample`` [S, K]."""
    error = energy = output_error = output_energy = 0.0
    for start in range(0, len(weight), MEASURED_ROWS):
        part = slice(start, start + MEASURED_ROWS)
        original = weight[part].float()
        difference = decode_weight(quantized.rows(part)) - original
        error, energy = error + float(difference.square().sum()), energy + float(original.square().sum())
        if sample is not None:
            output_error += float((sample @ difference.T).square().sum())
            output_energy += float((sample @ original.T).square().sum())
    measured = {"nmse": error / (energy or 1.0)}
    return measured if sample is None else measured | {"output_nmse": output_error / (output_energy or 1.0)}


def _search_exponent(weights: dict[str, torch.Tensor], statistics: InputStatistics, index_bits: int, rotation_block_size: int) -> float:
    """The exponent with the least output error, summed over the group, on some rows of every weight."""
    rows = [w[:: max(1, len(w) // SEARCH_ROWS)][:SEARCH_ROWS].float() for w in weights.values()]
    energies = [float((statistics.sample @ w.T).square().sum()) for w in rows]
    codebook = load_codebook(index_bits).to(rows[0].device)

    def error(exponent: float) -> float:
        scales = make_input_scales(len(statistics.rms), channel_scales(statistics.rms, exponent))
        rotated = rotate(statistics.sample * scales.to(codebook.device).float(), rotation_block_size)  # [S, K]
        total = 0.0
        for weight, energy in zip(rows, energies, strict=True):
            coordinates, row_norms = to_coordinates(weight, rotation_block_size, scales)
            coded = codebook[nearest(coordinates.view(-1, 2), index_bits).int()].view_as(coordinates)
            total += float((rotated @ (coded - coordinates).T * row_norms).square().sum()) / (energy or 1.0)
        return total

    return min(EXPONENTS, key=error)


def encode_group(weights: dict[str, torch.Tensor], index_bits: int, rotation_block_size: int,
                 statistics: InputStatistics | None) -> EncodedGroup:
    """Quantise the weights that read one activation.

    Args:
        weights: module name -> [N, K]; all on one device, with the same K.
        statistics: of the activation; None without calibration.
    """
    num_inputs = next(iter(weights.values())).shape[1]
    if statistics is None:
        exponent, scales = None, make_input_scales(num_inputs)
    else:
        exponent = _search_exponent(weights, statistics, index_bits, rotation_block_size)
        scales = make_input_scales(num_inputs, channel_scales(statistics.rms, exponent))
    quantized, errors = {}, {}
    for name, weight in weights.items():
        quantized[name] = encode_weight(weight, index_bits, rotation_block_size, scales, f"{name}.weight")
        errors[name] = measure(weight, quantized[name], None if statistics is None else statistics.sample)
    return EncodedGroup(quantized, exponent, errors)
