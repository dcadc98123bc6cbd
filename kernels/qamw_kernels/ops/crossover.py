"""Up to how many tokens the packed weight is multiplied directly. Needs triton.

With more tokens it is faster to decode the weight into a workspace and leave the rest to the
vendor's GEMM. Where the two ways take the same time depends on the GPU and on the kernel that the
installed Triton has; ``crossover.json`` holds what was measured, by benchmarks/kernels/linear.py.
"""

import functools
import json
from pathlib import Path

import torch

from qamw_kernels.ops.gluon import launch as gluon_launch
from qamw_kernels.ops.gluon import wide_launch
from qamw_kernels.ops.launcher import Processor

CROSSOVER_FILE = Path(__file__).with_name("crossover.json")
"""JSON object: :func:`crossover_key` -> tokens."""

GEMM_MAX_TOKENS = 16
"""Of a GPU that was not measured: with more, the kernels for few tokens read the activations more
often than is cheaper than decoding the weight. The wide kernel has a limit of its own."""


def crossover_key(device: torch.device, wide: bool) -> str:
    """What a measurement is valid for: the GPU's name, and the kernel that Triton has for it."""
    kernel = "wide" if wide else "gluon" if gluon_launch.kernels else "plain"
    return f"{torch.cuda.get_device_name(device)}, {kernel}"


@functools.cache
def _measured() -> dict[str, int]:
    measured: dict[str, int] = json.loads(CROSSOVER_FILE.read_text())
    return measured


@functools.cache
def gemm_max_tokens(
    device: torch.device,
    dtype: torch.dtype,
    index_bits: int,
    processor: Processor | None,
) -> int:
    """Tokens up to which multiplying with the packed weight is the faster way on that device."""
    wide = wide_launch.runs_on(dtype, index_bits, processor)
    limit = wide_launch.MAX_TOKENS if wide else GEMM_MAX_TOKENS
    if device.type != "cuda" or not _measured():
        return limit
    return _measured().get(crossover_key(device, wide), limit)
