"""Rates: how many bits a weight takes.

A pair of weights is stored as one index of ``index_bits`` bits, so the *nominal* rate is
``index_bits / 2`` bits per weight. The *stored* rate of a layer counts the bytes of its three
tensors: indices, row norms and input scales. The *effective* rate of several layers counts their
codebooks too, each once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qamw_kernels.errors import FormatError
from qamw_kernels.format.codebook import INDEX_BITS, PLAIN, codebook_bytes
from qamw_kernels.format.config import layer_tensors

MIN_BITS_PER_WEIGHT = INDEX_BITS.start / 2
MAX_BITS_PER_WEIGHT = (INDEX_BITS.stop - 1) / 2


def nominal_bits_per_weight(index_bits: float) -> float:
    """Bits per weight that the indices alone take; ``index_bits`` may be a mean over layers."""
    return index_bits / 2


def is_nominal(bits_per_weight: float) -> bool:
    """Whether a requested rate is a multiple of 0.5, and so counts the indices alone.

    Any other rate is effective: it includes row norms, input scales and codebooks.
    """
    return 2 * bits_per_weight % 1 == 0


def index_bits_within(bits_per_weight: float) -> int:
    """The most index bits per pair that a rate in bits per weight pays for.

    Raises:
        FormatError: the rate is not in 3.0..6.0.
    """
    if not MIN_BITS_PER_WEIGHT <= bits_per_weight <= MAX_BITS_PER_WEIGHT:  # also refuses NaN
        raise FormatError(
            f"expected {MIN_BITS_PER_WEIGHT:g} to {MAX_BITS_PER_WEIGHT:g}, got {bits_per_weight:g}"
        )
    return int(2 * bits_per_weight)


def index_bits_of_rate(bits_per_weight: object) -> int:
    """Index bits per pair of exactly this nominal rate, as config.json gives it.

    Raises:
        FormatError: not a number, or not one of 3, 3.5 ... 6.
    """
    doubled = 2 * bits_per_weight if isinstance(bits_per_weight, int | float) else 0
    if doubled not in INDEX_BITS:
        raise FormatError(
            f"quantization_config: bits_per_weight must be {MIN_BITS_PER_WEIGHT:g}, "
            f"{MIN_BITS_PER_WEIGHT + 0.5:g} ... {MAX_BITS_PER_WEIGHT:g} when a model is quantized "
            f"while loading, got {bits_per_weight!r}"
        )
    return int(doubled)


def stored_bytes(num_rows: int, num_inputs: int, index_bits: int) -> int:
    """Bytes of the three tensors that stand for a linear layer [N, K]."""
    tensors = layer_tensors(num_rows, num_inputs, index_bits).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)


def stored_bits_per_weight(num_bytes: int, num_weights: int) -> float:
    """Bits per weight of layers that take ``num_bytes``."""
    return 8 * num_bytes / num_weights


@dataclass(frozen=True)
class QuantizedShape:
    """Size and rate of one quantized linear layer.

    Attributes:
        num_rows, num_inputs: N and K of its weight.
        index_bits: bits per pair of weights.
        code: one of CODES.
    """

    num_rows: int
    num_inputs: int
    index_bits: int
    code: str = PLAIN

    @property
    def num_weights(self) -> int:
        return self.num_rows * self.num_inputs

    @property
    def num_bytes(self) -> int:
        """Stored bytes of its three tensors; codebooks are shared, and not counted here."""
        return stored_bytes(self.num_rows, self.num_inputs, self.index_bits)

    @property
    def stored_bits_per_weight(self) -> float:
        """What its three tensors take; codebooks are not counted here."""
        return stored_bits_per_weight(self.num_bytes, self.num_weights)


def effective_bits_per_weight(shapes: Iterable[QuantizedShape]) -> float:
    """All stored bytes of these layers, and the codebooks of their rates, in bits per weight."""
    layers = list(shapes)
    num_bytes = sum(layer.num_bytes for layer in layers)
    num_bytes += codebook_bytes((layer.index_bits, layer.code) for layer in layers)
    return stored_bits_per_weight(num_bytes, sum(layer.num_weights for layer in layers))
