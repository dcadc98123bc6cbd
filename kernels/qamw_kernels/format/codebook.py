"""The shipped codebooks: named, hashed, exact in bfloat16, float16 and float32.

There is one for every code and number of index bits. Only its *entries* are stored: the codewords
from which flips of signs make all others. See docs/format.md, and for the trellis
:mod:`qamw_kernels.codec.trellis`.
"""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

INDEX_BITS = range(6, 13)
"""Supported index bits per pair: 64 to 4096 indices, 3.0 to 6.0 bits per weight."""

PLAIN, TRELLIS = "plain", "trellis"
CODES = (PLAIN, TRELLIS)
"""How indices become codewords: each by itself, or along a path through a trellis."""

_SIGN_BITS = {PLAIN: 2, TRELLIS: 1}  # of an index: both signs, or the bit of the path
_NAMES = {PLAIN: "circular-gaussian-{}-v1", TRELLIS: "trellis-gaussian-{}-v1"}
_DATA = Path(__file__).with_name("codebooks.safetensors")


def entry_bits(index_bits: int, code: str) -> int:
    """How many of the lowest bits of an index are the number of an entry."""
    return index_bits - _SIGN_BITS[code]


def codebook_name(index_bits: int, code: str) -> str:
    """The name a checkpoint gives to the codebook of ``2**index_bits`` indices."""
    return _NAMES[code].format(2**index_bits)


@functools.cache
def load_entries(index_bits: int, code: str) -> torch.Tensor:
    """The stored part of a codebook.

    Of the plain code these are the codewords with x > 0 and y > 0, the *quadrant*; of the trellis
    those of class 0.

    Returns:
        [2**entry_bits, 2] float32 on the CPU, sorted by (x, y); every value is exact in bfloat16.
        Treat it as read-only.
    Raises:
        ValueError: ``index_bits`` is not in 6..12.
    """
    if index_bits not in INDEX_BITS:
        raise ValueError(
            f"index_bits must be in {INDEX_BITS.start}..{INDEX_BITS.stop - 1}, got {index_bits!r}"
        )
    return _load_all()[codebook_name(index_bits, code)].float()


def codebook_bytes(codebooks: Iterable[tuple[int, str]]) -> int:
    """Stored bytes of the codebooks of these index bits and codes, each counted once."""
    return sum(2 * load_entries(bits, code).numel() for bits, code in set(codebooks))


@functools.cache
def _load_all() -> dict[str, torch.Tensor]:
    return load_file(_DATA)


@functools.cache
def codebook_sha256(index_bits: int, code: str) -> str:
    """SHA-256 of the entries' bfloat16 values, little-endian, row by row."""
    entries = load_entries(index_bits, code).bfloat16().contiguous()
    return hashlib.sha256(entries.view(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()


def flip_signs(entries: torch.Tensor) -> torch.Tensor:
    """Entries [E, 2] with all four signs [4 * E, 2], in their dtype and on their device.

    Row ``m + sx * E + sy * 2 * E`` is entry m, with x negated if sx is 1, and y if sy is.
    """
    signs = entries.new_tensor([[1, 1], [-1, 1], [1, -1], [-1, -1]])
    return (signs[:, None] * entries).reshape(-1, 2)


@functools.cache
def load_codebook(index_bits: int, code: str = PLAIN) -> torch.Tensor:
    """The whole codebook [C, 2] float32 on the CPU, entries with all signs; treat it as read-only.

    Row i is what index i of the plain code stands for. The trellis has twice as many rows.

    Raises:
        ValueError: ``index_bits`` is not in 6..12.
    """
    return flip_signs(load_entries(index_bits, code))
