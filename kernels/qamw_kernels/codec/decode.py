"""From the stored tensors back to a weight, in plain torch: the definition of the format."""

import torch

from qamw_kernels.codec.rotation import rotate, unrotate
from qamw_kernels.codec.trellis import codebook_rows
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import TRELLIS, load_codebook
from qamw_kernels.format.packing import unpack_planes
from qamw_kernels.format.weight import QuantizedWeight

_ROWS_AT_ONCE = 4096  # the float32 intermediate of a large layer stays small


def decode_coordinates(quantized: QuantizedWeight) -> torch.Tensor:
    """The rotated, normalized weight [N, K] float32."""
    return decode_indices(unpack_planes(quantized.qweight), quantized.index_bits, quantized.code)


def decode_indices(indices: torch.Tensor, index_bits: int, code: str) -> torch.Tensor:
    """The coordinates [N, 2 * P] float32 that indices [N, P] int16 stand for."""
    codebook = load_codebook(index_bits, code).to(indices.device)
    rows = codebook_rows(indices, index_bits) if code == TRELLIS else indices
    return codebook[rows.int()].flatten(1)


def decode_weight(quantized: QuantizedWeight) -> torch.Tensor:
    """The weight [N, K] float32 that a quantized layer stands for, as the format defines it."""
    weight = unrotate(decode_coordinates(quantized), quantized.rotation_block_size)
    return weight.mul_(quantized.row_norms[:, None]).mul_(quantized.input_scales.float())


def decode_checked(quantized: QuantizedWeight, name: str, dtype: torch.dtype) -> torch.Tensor:
    """:func:`decode_weight` for a checkpoint from an untrusted source, rounded to ``dtype``.

    Args:
        name: of the module, for errors.
    Returns:
        [N, K], finite.
    Raises:
        TensorError: see :meth:`QuantizedWeight.check`; or ``dtype`` does not hold a weight.
    """
    quantized.check(name)
    rounded = torch.empty(quantized.shape, dtype=dtype, device=quantized.qweight.device)
    for start in range(0, len(rounded), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        weight = decode_weight(quantized.rows(part))
        rounded[part] = weight
        if not rounded[part].isfinite().all():
            row, column = (~rounded[part].isfinite()).nonzero()[0].tolist()
            raise TensorError(
                f"{name}.weight[{start + row}, {column}] decodes to {float(weight[row, column])}, "
                f"too large for {dtype}; bfloat16 and float32 have a wider range"
            )
    return rounded


def linear_reference(
    x: torch.Tensor,
    quantized: QuantizedWeight,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product with a weight as the format defines it: rotate x, then multiply with codewords.

    The ops have a plain torch form too, which reads tiles: :mod:`qamw_kernels.ops.reference`. Tests
    compare that form, and the kernels, with this function.

    Args:
        x: [..., K] floating point. bias: [N] or None.
    Returns:
        [..., N] in the dtype of x, accumulated in float32.
    """
    rotated = rotate(x.float() * quantized.input_scales.float(), quantized.rotation_block_size)
    y = rotated @ decode_coordinates(quantized).T * quantized.row_norms
    return (y if bias is None else y + bias.float()).to(x.dtype)
