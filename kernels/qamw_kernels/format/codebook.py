"""The shipped codebooks: named, hashed, quadrant-symmetric, exact in bfloat16, float16, float32."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

INDEX_BITS = range(6, 13)
"""Supported index bits per pair: 64 to 4096 codewords, 3.0 to 6.0 bits per weight."""

_DATA = Path(__file__).with_name("codebooks.safetensors")


def codebook_name(index_bits: int) -> str:
    """The name a checkpoint gives to the codebook of ``2**index_bits`` codewords."""
    return f"circular-gaussian-{2**index_bits}-v1"


@functools.cache
def load_quadrant(index_bits: int) -> torch.Tensor:
    """The stored part of a codebook: its codewords with x > 0 and y > 0.

    Returns:
        [C / 4, 2] float32 on the CPU, sorted by (x, y); every value is exact in bfloat16. Treat it
        as read-only.
    Raises:
        ValueError: ``index_bits`` is not in 6..12.
    """
    if index_bits not in INDEX_BITS:
        raise ValueError(
            f"index_bits must be in {INDEX_BITS.start}..{INDEX_BITS.stop - 1}, got {index_bits!r}"
        )
    return _load_all()[codebook_name(index_bits)].float()


def codebook_bytes(index_bits: Iterable[int]) -> int:
    """Stored bytes of the codebooks of these rates, each counted once."""
    return sum(2 * load_quadrant(bits).numel() for bits in set(index_bits))


@functools.cache
def _load_all() -> dict[str, torch.Tensor]:
    return load_file(_DATA)


@functools.cache
def codebook_sha256(index_bits: int) -> str:
    """SHA-256 of the quadrant's bfloat16 values, little-endian, row by row."""
    quadrant = load_quadrant(index_bits).bfloat16().contiguous()
    return hashlib.sha256(quadrant.view(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()


def expand_quadrant(quadrant: torch.Tensor) -> torch.Tensor:
    """The whole codebook [C, 2] of a quadrant [C / 4, 2], in its dtype and on its device.

    Row ``m + (x < 0) << (b - 2) + (y < 0) << (b - 1)`` is the codeword (x, y) of b index bits whose
    absolute values (|x|, |y|) are row ``m`` of the quadrant.
    """
    signs = quadrant.new_tensor([[1, 1], [-1, 1], [1, -1], [-1, -1]])
    return (signs[:, None] * quadrant).reshape(-1, 2)


@functools.cache
def load_codebook(index_bits: int) -> torch.Tensor:
    """The whole codebook [C, 2] float32 on the CPU; treat it as read-only.

    Raises:
        ValueError: ``index_bits`` is not in 6..12.
    """
    return expand_quadrant(load_quadrant(index_bits))
