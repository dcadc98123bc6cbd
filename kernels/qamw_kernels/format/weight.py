"""One quantized weight matrix as it is stored, and what its values must be."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import load_entries


@dataclass
class QuantizedWeight:
    """One quantized weight matrix, as stored.

    Attributes:
        qweight: [index_bits, N, K / 64] int32, see :mod:`qamw_kernels.format.packing`.
        row_norms: [N] float32, not negative; 0 for a zero row.
        input_scales: [K] float16, normal numbers.
        rotation_block_size: Hadamard width, divides K.
        code: how indices become codewords, one of CODES.
    """

    qweight: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    rotation_block_size: int
    code: str

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
        return dataclasses.replace(
            self, qweight=self.qweight[:, part], row_norms=self.row_norms[part]
        )

    @property
    def largest_row_norm(self) -> float:
        """See :func:`largest_row_norm`."""
        return largest_row_norm(
            self.index_bits, self.code, self.rotation_block_size, self.input_scales
        )

    def check(self, name: str) -> None:
        """Check the values of a weight, or of a part of its rows or inputs; any planes are valid.

        Called wherever a checkpoint is read, before it is decoded or multiplied.

        Args:
            name: of the module, for errors.
        Raises:
            TensorError: a row norm is negative or not finite, an input scale is no normal float16
                number, or a row norm is above :func:`largest_row_norm`.
        """
        check_row_norms(self.row_norms, f"{name}.row_norms")
        check_input_scales(self.input_scales, f"{name}.input_scales")
        most = self.largest_row_norm
        wrong = self.row_norms > most
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise TensorError(
                f"{name}.row_norms: float32 cannot hold what row {row} can decode to: its norm "
                f"is {float(self.row_norms[row])}, expected at most {most} with these input scales"
            )


def largest_row_norm(
    index_bits: int, code: str, rotation_block_size: int, input_scales: torch.Tensor
) -> float:
    """The largest norm of a row that decodes to finite float32, whatever its indices are.

    A decoded weight is ``(sum of +-c over its rotation block) / sqrt(B) * row_norm * scale``. The B
    coordinates c of a block are B / 2 codewords (x, y), each of which adds at most ``|x| + |y|``.
    So the first factor is at most ``sqrt(B) / 2 * max(|x| + |y|)``, which some indices of the plain
    code reach. It is multiplied with the norm first, so a scale below 1 cannot undo an overflow.

    Args:
        input_scales: [K] float16, or a part of them.
    """
    widest = float(load_entries(index_bits, code).abs().sum(1).max())
    coordinate = math.sqrt(rotation_block_size) / 2 * widest
    scale = max(1.0, float(input_scales.abs().max()))
    rounding = 1 - 2**-16  # of log2(B) sums and three products, each error below 2**-24
    return torch.finfo(torch.float32).max * rounding / (coordinate * scale)


def check_input_scales(input_scales: torch.Tensor, name: str = "input_scales") -> None:
    """Check [K] float16: finite, not zero, of full precision.

    Args:
        name: of the tensor, for errors.
    Raises:
        TensorError: names the first value that is not a normal float16 number.
    """
    magnitude = input_scales.abs()
    normal = magnitude.isfinite() & (magnitude >= torch.finfo(torch.float16).tiny)
    if not normal.all():
        at = int((~normal).nonzero()[0, 0])
        raise TensorError(
            f"{name}[{at}] = {float(input_scales[at])}: expected a finite, normal float16 number"
        )


def check_row_norms(row_norms: torch.Tensor, name: str = "row_norms") -> None:
    """Check [N] float32.

    Args:
        name: of the tensor, for errors.
    Raises:
        TensorError: names the first value that is not finite, or is negative.
    """
    wrong = ~(row_norms.isfinite() & (row_norms >= 0))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise TensorError(
            f"{name}: expected finite values, not negative, got {float(row_norms[row])} "
            f"in row {row}"
        )


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Check a plain weight of any shape.

    Raises:
        TensorError: names the first value that is NaN or infinite.
    """
    # Minimum and maximum are found without copies, and are NaN if any value is.
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
        at = (~weight.isfinite()).nonzero()[0].tolist()
        raise TensorError(f"{name}{at} is {float(weight[tuple(at)])}: every weight must be finite")


def check_plain(tensor: torch.Tensor, name: str) -> None:
    """Check a tensor that is not quantized; buffers may be integers.

    One buffer is called ``bias``: the causal mask [1, 1, n, n] in old checkpoints (GPT-2, Pythia).

    Raises:
        TensorError: a weight or bias that is not of floating point, or a value that is not finite.
    """
    mask = name.endswith(".bias") and tensor.ndim == 4
    if not (tensor.is_floating_point() or mask) and name.endswith((".weight", ".bias")):
        raise TensorError(f"{name} is {tensor.dtype}, expected floating point")
    if tensor.dtype.itemsize > 1:  # 8 bits have no infinity
        check_finite(tensor, name)
