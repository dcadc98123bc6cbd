"""Random weights to measure with, and the check of what is multiplied with them.

A benchmark that finds a wrong result reports no speed.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from qamw_kernels.codec.rotation import hadamard
from qamw_kernels.format.codebook import PLAIN
from qamw_kernels.ops import reference
from qamw_kernels.ops.tiling import tiled_shape
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.weight import TiledWeight, entry_words

Multiply = Callable[[torch.Tensor, TiledWeight, torch.Tensor | None], torch.Tensor]

ROTATION_BLOCK_SIZE = 128
DTYPE = torch.bfloat16
WAYS: dict[str, Multiply] = {
    "packed": launch.multiply_packed,
    "dequantized": launch.multiply_dequantized,
}
LARGEST_ERROR = 2**-7
"""Largest relative error, in norms, that bfloat16 explains."""


def random_weight(
    num_rows: int, num_inputs: int, index_bits: int, device: str, code: str = PLAIN
) -> TiledWeight:
    """Random indices: speed does not depend on them, and what lies past the end is not read."""
    shape = tiled_shape(num_rows, num_inputs, index_bits)
    return TiledWeight(
        tiles=torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device),
        row_norms=torch.rand(num_rows, device=device) / num_inputs**0.5 + 0.01,
        input_scales=(torch.rand(num_inputs, device=device) + 0.5).half(),
        entry_words=entry_words(index_bits, code, device),
        rotation_block_size=ROTATION_BLOCK_SIZE,
    )


def exact(weight: TiledWeight, x: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the weight, [M, N] float64, from the indices alone."""
    coordinates = reference.coordinates(weight)
    size = weight.rotation_block_size
    matrix = hadamard(size).to(x.device, torch.float64) / size**0.5
    rotated = ((x.double() * weight.input_scales.double()).view(-1, size) @ matrix).view(x.shape)
    y = torch.empty(len(x), len(coordinates), dtype=torch.float64, device=x.device)
    for rows in torch.arange(len(coordinates), device=x.device).split(1024):
        y[:, rows] = rotated @ coordinates[rows].double().T * weight.row_norms[rows].double()
    return y


def check(
    num_rows: int,
    num_inputs: int,
    index_bits: int,
    tokens: Sequence[int],
    device: str,
    ways: Mapping[str, Multiply] = WAYS,
) -> None:
    """Stop the program if a result is further from the exact one than bfloat16 explains."""
    weight = random_weight(num_rows, num_inputs, index_bits, device)
    for num_tokens in tokens:
        x = torch.randn(num_tokens, num_inputs, dtype=DTYPE, device=device)
        expected = exact(weight, x)
        for name, multiply in ways.items():
            error = (multiply(x, weight, None).double() - expected).norm() / expected.norm()
            if not error < LARGEST_ERROR:
                sys.exit(
                    f"{name}, {num_tokens} tokens, {num_rows} x {num_inputs}, {index_bits} index "
                    f"bits: relative error {float(error):.2g}, no speed is given"
                )
