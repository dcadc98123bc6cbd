"""One quantized weight matrix as it is stored, and what its values must be."""

from dataclasses import dataclass

import torch

from qamw_kernels.errors import TensorError


@dataclass
class QuantizedWeight:
    """One quantized weight matrix, as stored.

    Attributes:
        qweight: [index_bits, N, K / 64] int32, see :mod:`qamw_kernels.format.packing`.
        row_norms: [N] float32, not negative; 0 for a zero row.
        input_scales: [K] float16, normal numbers.
        rotation_block_size: Hadamard width, divides K.
    """

    qweight: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    rotation_block_size: int

    @property
    def index_bits(self) -> int:
        """Bits per pair."""
        return self.qweight.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return len(self.row_norms), len(self.input_scales)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix, in the order of ``LAYER_TENSORS``."""
        return {
            "qweight": self.qweight,
            "row_norms": self.row_norms,
            "input_scales": self.input_scales,
        }

    def rows(self, part: slice) -> "QuantizedWeight":
        """The same weight, some of its rows only."""
        return QuantizedWeight(
            self.qweight[:, part],
            self.row_norms[part],
            self.input_scales,
            self.rotation_block_size,
        )


def check_input_scales(input_scales: torch.Tensor) -> None:
    """Check [K] float16: finite, not zero, of full precision.

    Raises:
        TensorError: names the first value that is not a normal float16 number.
    """
    magnitude = input_scales.abs()
    normal = magnitude.isfinite() & (magnitude >= torch.finfo(torch.float16).tiny)
    if not normal.all():
        at = int((~normal).nonzero()[0, 0])
        raise TensorError(
            f"input_scales[{at}] = {float(input_scales[at])}: "
            "expected a finite, normal float16 number"
        )


def check_row_norms(row_norms: torch.Tensor) -> None:
    """Check [N] float32.

    Raises:
        TensorError: names the first value that is not finite, or is negative.
    """
    wrong = ~(row_norms.isfinite() & (row_norms >= 0))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise TensorError(
            f"row_norms: expected finite values, not negative, got {float(row_norms[row])} "
            f"in row {row}"
        )


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Check a plain weight of any shape.

    Raises:
        TensorError: names the first value that is NaN or infinite.
    """
    if not weight.isfinite().all():
        at = (~weight.isfinite()).nonzero()[0].tolist()
        raise TensorError(f"{name}{at} is {float(weight[tuple(at)])}: every weight must be finite")
