"""Block Hadamard rotation of the input dimension, in plain torch: the truth the kernels are tested against."""

import functools
import math

import torch

ROTATION_BLOCK_SIZES = (16, 32, 64, 128, 256, 512)


@functools.lru_cache(maxsize=32)
def hadamard(size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """The +1/-1 Sylvester Hadamard matrix [size, size]; symmetric, and H @ H = size * I."""
    if size not in ROTATION_BLOCK_SIZES:
        raise ValueError(f"rotation_block_size must be one of {ROTATION_BLOCK_SIZES}, got {size!r}")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix.to(device, dtype)


def rotate(x: torch.Tensor, rotation_block_size: int) -> torch.Tensor:
    """Orthonormal Hadamard transform of each block of inputs.

    Args:
        x: [..., K], floating point; K a multiple of ``rotation_block_size``.
    Returns:
        [..., K] in the dtype of x; computed in float32 for narrower dtypes.
    """
    if x.shape[-1] % rotation_block_size:
        raise ValueError(f"{x.shape[-1]} inputs are not a multiple of rotation_block_size = {rotation_block_size}")
    compute = torch.promote_types(x.dtype, torch.float32)
    matrix = hadamard(rotation_block_size, compute, x.device)
    blocks = x.to(compute).reshape(-1, rotation_block_size)
    return ((blocks @ matrix) / math.sqrt(rotation_block_size)).reshape(x.shape).to(x.dtype)


def unrotate(x: torch.Tensor, rotation_block_size: int) -> torch.Tensor:
    """Inverse of :func:`rotate`. The Sylvester matrix is symmetric, so it is the same transform."""
    return rotate(x, rotation_block_size)
