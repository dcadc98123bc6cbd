"""The weights of one input group become quantized weights. How data flows:

1. Weights and Hessians -> input scales, one vector for the group (:mod:`.scales`).
2. Hessian and input scales -> a coder (one of CODERS): a function from coordinates to indices.
   Without a Hessian there is none.
3. ``qamw_kernels``' ``encode_weight`` scales, normalizes and rotates some rows of a weight at a
   time, has the coder choose their indices (or takes those of least squared error), and packs them.
4. With the encoder "beam", row norms are fitted to what was coded (:func:`fit_row_norms`).
5. The quantized weight is decoded again and compared with the original (:func:`measure`).

With scales and Hessian given, rows are encoded independently. So several processes divide the rows
of all weights of a group, in order: each encodes whole weights of experts, or part of a large one.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offline_quantize.encoding.beam import beam_coder
from offline_quantize.encoding.feedback import feedback_coder, rotated_root
from offline_quantize.encoding.scales import balanced_scales, searched_scales
from offline_quantize.encoding.trellis import sweeping_coder, trellis_coder
from offline_quantize.ranks import ALONE, Ranks
from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import ENCODE_CHUNK, Coder, encode_weight, make_input_scales
from qamw_kernels.codec.trellis import path_inputs
from qamw_kernels.format.codebook import PLAIN, TRELLIS
from qamw_kernels.format.weight import QuantizedWeight

CODERS = {
    "feedback": {PLAIN: feedback_coder, TRELLIS: trellis_coder},
    "beam": {PLAIN: beam_coder, TRELLIS: sweeping_coder},
}
"""Encoder -> code -> function that makes a coder from a root and index bits."""

ENCODERS = (*CODERS, "nearest")
"""All but the last need a calibration text."""

SEARCH_ROWS = 128  # of every weight, on which scales for "nearest" are chosen
MEASURED_ROWS = 1024  # decoded at once
FEEDBACK_WEIGHTS = 1 << 24  # encoded at once, with feedback
FITTED = (0.9, 1.1)  # limits of the factor: a larger change would fit noise


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
class _Energies:
    """Sums over some rows of a weight.

    Attributes:
        error: squared errors.
        weight: squared originals.
        output_error: squared errors of the layer's output; 0 where its input is not known.
        output: squared outputs; likewise.
    """

    error: float = 0.0
    weight: float = 0.0
    output_error: float = 0.0
    output: float = 0.0

    def __add__(self, other: "_Energies") -> "_Energies":
        return _Energies(
            self.error + other.error,
            self.weight + other.weight,
            self.output_error + other.output_error,
            self.output + other.output,
        )

    def errors(self, of_output: bool) -> Errors:
        """Relative errors; those of the output are None where nothing is known of the input."""
        output = self.output_error / (self.output or 1.0) if of_output else None
        return Errors(self.error / (self.weight or 1.0), output)


@dataclass(frozen=True)
class _Part:
    """Some rows of a quantized weight, on the CPU.

    Attributes:
        qweight: [index_bits, n, K / 64] int32.
        row_norms: [n] float32.
        energies: of these rows.
    """

    qweight: torch.Tensor
    row_norms: torch.Tensor
    energies: _Energies


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
    return _energies(weight, quantized, hessian).errors(of_output=hessian is not None)


def _energies(
    weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor | None
) -> _Energies:
    """The sums that errors are made of; the arguments are those of :func:`measure`."""
    total = _Energies()
    for start in range(0, len(weight), MEASURED_ROWS):
        part = slice(start, start + MEASURED_ROWS)
        original = weight[part].float()
        difference = decode_weight(quantized.rows(part)) - original
        error, energy = float(difference.square().sum()), float(original.square().sum())
        if hessian is None:
            total += _Energies(error, energy)
        else:
            outputs = (_output_energy(x, hessian) for x in (difference, original))
            total += _Energies(error, energy, *outputs)
    return total


def fit_row_norms(
    weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor
) -> QuantizedWeight:
    """The quantized weight with the row norms of least output error, for the indices that it has.

    Args:
        weight: the original [N, K].
        hessian: second moment [K, K] float32 of its input.
    """
    factors = []
    for start in range(0, len(weight), MEASURED_ROWS):
        part = slice(start, start + MEASURED_ROWS)
        decoded = decode_weight(quantized.rows(part))
        outputs = decoded @ hessian
        energy = torch.linalg.vecdot(outputs, decoded)
        factor = torch.linalg.vecdot(outputs, weight[part].float()) / energy
        factors.append(torch.where(factor.isfinite(), factor, 1))
    fitted = quantized.row_norms * torch.cat(factors).clamp(*FITTED)
    row_norms = torch.where(fitted > quantized.largest_row_norm, quantized.row_norms, fitted)
    return dataclasses.replace(quantized, row_norms=row_norms)


def _scales_for_nearest(
    weights: dict[str, torch.Tensor],
    index_bits: int,
    rotation_block_size: int,
    hessians: Mapping[str, torch.Tensor | None],
    code: str,
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
            quantized = encode_weight(weight, index_bits, rotation_block_size, scales, code=code)
            total += measure(weight, quantized, known[name]).output_nmse or 0.0
        return total

    return searched_scales(magnitudes, output_error)


def make_coder(
    hessian: torch.Tensor,
    scales: torch.Tensor,
    rotation_block_size: int,
    index_bits: int,
    encoder: str,
    code: str,
) -> Coder:
    """The coder for one input.

    Args:
        hessian: [K, K] float32. scales: [K] float16.
        encoder: one of ENCODERS, but not "nearest".
    Raises:
        TensorError: the Hessian is not finite.
    """
    order = path_inputs(len(hessian)) if code == TRELLIS else None
    root = rotated_root(hessian, scales, rotation_block_size, order)
    return CODERS[encoder][code](root, index_bits)


def encode_group(
    weights: dict[str, torch.Tensor],
    index_bits: int,
    rotation_block_size: int,
    hessians: Mapping[str, torch.Tensor | None],
    encoder: str,
    balance: bool = True,
    ranks: Ranks = ALONE,
    code: str = PLAIN,
) -> EncodedGroup:
    """Quantize the weights of an input group, which share input scales.

    Args:
        weights: module name -> [N, K]; all on one device, with the same K.
        hessians: module name -> [K, K] float32, mean of x^T x over what the module reads; the same
            tensor where modules read the same. None where its input is not known: it gets the
            nearest codewords.
        encoder: one of ENCODERS.
        balance: whether error feedback has channel scales, :func:`balanced_scales`.
        ranks: the processes that share the rows; each has all weights, and gets all results.
        code: one of CODES.
    Returns:
        Tensors on the CPU.
    Raises:
        TensorError: a weight is not finite, or a Hessian is not.
    """

    def choose_scales() -> torch.Tensor:
        known = any(hessian is not None for hessian in hessians.values())
        if known and encoder == "nearest":
            return _scales_for_nearest(weights, index_bits, rotation_block_size, hessians, code)
        if known and balance:
            return balanced_scales(weights.values())
        return make_input_scales(next(iter(weights.values())).shape[1])

    scales = ranks.decide(choose_scales)
    own: dict[str, _Part] = {}
    coder: Coder | None = None
    coder_hessian = None
    for name, rows in _own_rows(weights, ranks).items():
        hessian = hessians[name] if encoder != "nearest" else None
        if hessian is not coder_hessian:
            coder = None  # a coder is large: one at a time
            if hessian is not None:
                coder = make_coder(hessian, scales, rotation_block_size, index_bits, encoder, code)
            coder_hessian = hessian
        weight = weights[name][rows]
        encoded = encode_weight(
            weight,
            index_bits,
            rotation_block_size,
            scales,
            name=f"{name}.weight" + (f"[{rows.start}:]" if rows.start else ""),
            coder=coder,
            weights_at_once=FEEDBACK_WEIGHTS if coder else ENCODE_CHUNK,
            code=code,
        )
        if encoder == "beam" and hessian is not None:
            encoded = fit_row_norms(weight, encoded, hessian)
        energies = _energies(weight, encoded, hessians[name])
        own[name] = _Part(encoded.qweight.cpu(), encoded.row_norms.cpu(), energies)
    parts = ranks.gather(own)
    quantized, errors = {}, {}
    for name in weights:
        of_weight = [found[name] for found in parts if name in found]
        quantized[name] = QuantizedWeight(
            torch.cat([part.qweight for part in of_weight], 1),
            torch.cat([part.row_norms for part in of_weight]),
            scales.cpu(),
            rotation_block_size,
            code,
        )
        total = sum((part.energies for part in of_weight), _Energies())
        errors[name] = total.errors(of_output=hessians[name] is not None)
    return EncodedGroup(quantized, errors)


def _own_rows(weights: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, slice]:
    """The rows of each weight that this process encodes: its share of all rows in order."""
    stretch = ranks.share(sum(map(len, weights.values())))
    rows, first = {}, 0
    for name, weight in weights.items():
        part = slice(max(stretch.start - first, 0), min(stretch.stop - first, len(weight)))
        if part.start < part.stop:
            rows[name] = part
        first += len(weight)
    return rows
