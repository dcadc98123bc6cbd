"""Block Hadamard rotation of the input dimension, in plain torch: the truth the kernels are tested against."""

import math

import torch

ROTATION_BLOCK_SIZES = (16, 32, 64, 128, 256, 512)


def check_rotation_block_size(rotation_block_size: int) -> None:
    """Raise ValueError unless it is one of ROTATION_BLOCK_SIZES."""
    if rotation_block_size not in ROTATION_BLOCK_SIZES:
        raise ValueError(f"rotation_block_size must be one of {ROTATION_BLOCK_SIZES}, got {rotation_block_size!r}")


def hadamard(size: int) -> torch.Tensor:
    """The +1/-1 Sylvester Hadamard matrix [size, size] float32: entry (i, j) is -1 to the number of bits set in i & j."""
    check_rotation_block_size(size)
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def rotate(x: torch.Tensor, rotation_block_size: int) -> torch.Tensor:
    """Orthonormal Hadamard transform of each block of inputs.

    Sums of two, in a fixed order, not a matrix product: the result is the same bit for bit on every machine, and so is
    what the encoder makes of it.

    Args:
        x: [..., K], floating point; K a multiple of ``rotation_block_size``.
    Returns:
        [..., K] in the dtype of x; computed in float32 for narrower dtypes.
    """
    check_rotation_block_size(rotation_block_size)
    if x.shape[-1] % rotation_block_size:
        raise ValueError(f"{x.shape[-1]} inputs are not a multiple of rotation_block_size = {rotation_block_size}")
    blocks = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, rotation_block_size)
    y = blocks.T.clone(memory_format=torch.contiguous_format)  # [B, blocks]: every sum below runs over long contiguous rows
    z = torch.empty_like(y)
    half = 1
    while half < rotation_block_size:
        a, b = y.view(-1, 2, half, y.shape[1]).unbind(1)
        out = z.view(-1, 2, half, y.shape[1])
        torch.add(a, b, out=out[:, 0])
        torch.sub(a, b, out=out[:, 1])
        y, z, half = z, y, 2 * half
    scale = y.new_full((), math.sqrt(rotation_block_size))  # not a number: CUDA would multiply with its rounded inverse
    return (y / scale).T.reshape(x.shape).to(x.dtype).contiguous()


def unrotate(x: torch.Tensor, rotation_block_size: int) -> torch.Tensor:
    """Inverse of :func:`rotate`. The Sylvester matrix is symmetric, so it is the same transform."""
    return rotate(x, rotation_block_size)
