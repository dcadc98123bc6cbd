"""Block Hadamard rotation of the input dimension, in plain torch: the reference of the kernels."""

import math

import torch

from qamw_kernels.format.config import check_rotation_block_size


def hadamard(size: int) -> torch.Tensor:
    """The +1/-1 Sylvester Hadamard matrix [size, size] float32.

    Entry (i, j) is -1 to the power of the number of bits set in i & j.

    Raises:
        ValueError: ``size`` is not one of ROTATION_BLOCK_SIZES.
    """
    check_rotation_block_size(size)
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def rotate(x: torch.Tensor, rotation_block_size: int) -> torch.Tensor:
    """Orthonormal Hadamard transform of each block of inputs.

    Computed as sums and differences of two values in a fixed order, not as a matrix product: the
    result, and so the output of the encoder, is the same bit for bit on every machine.

    Args:
        x: [..., K], floating point; K a multiple of ``rotation_block_size``.
    Returns:
        [..., K] in the dtype of x; computed in float32 for narrower dtypes.
    Raises:
        ValueError: ``rotation_block_size`` is not one of ROTATION_BLOCK_SIZES, or does not divide
            K.
    """
    check_rotation_block_size(rotation_block_size)
    if x.shape[-1] % rotation_block_size:
        raise ValueError(
            f"{x.shape[-1]} inputs are not a multiple of rotation_block_size = "
            f"{rotation_block_size}"
        )
    blocks = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, rotation_block_size)
    # [B, blocks]: every sum below runs over long contiguous rows
    y = blocks.T.clone(memory_format=torch.contiguous_format)
    z = torch.empty_like(y)
    half = 1
    while half < rotation_block_size:
        a, b = y.view(-1, 2, half, y.shape[1]).unbind(1)
        out = z.view(-1, 2, half, y.shape[1])
        torch.add(a, b, out=out[:, 0])
        torch.sub(a, b, out=out[:, 1])
        y, z, half = z, y, 2 * half
    # a tensor, not a number: CUDA would multiply with the rounded inverse of a number
    scale = y.new_full((), math.sqrt(rotation_block_size))
    return (y / scale).T.reshape(x.shape).to(x.dtype).contiguous()


def unrotate(x: torch.Tensor, rotation_block_size: int) -> torch.Tensor:
    """Inverse of :func:`rotate`. The Sylvester matrix is symmetric, so it is the same transform."""
    return rotate(x, rotation_block_size)
