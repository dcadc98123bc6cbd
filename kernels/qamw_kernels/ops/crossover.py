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

CROSSOVER_FILE = Path(__file__).with_name("crossover.json")
"""JSON object: :func:`crossover_key` -> tokens."""

GEMM_MAX_TOKENS = 128
"""Of a GPU that was not measured: twice what one program of the Gluon kernel holds."""


def crossover_key(device: torch.device) -> str:
    """What a measurement is valid for: the GPU's name, and the kernel that Triton has."""
    kernel = "gluon" if gluon_launch.kernels else "plain"
    return f"{torch.cuda.get_device_name(device)}, {kernel}"


@functools.cache
def gemm_max_tokens(device: torch.device) -> int:
    """Tokens up to which multiplying with the packed weight is the faster way on that device."""
    measured: dict[str, int] = {}
    if device.type == "cuda":
        measured = json.loads(CROSSOVER_FILE.read_text())
    return measured.get(crossover_key(device), GEMM_MAX_TOKENS) if measured else GEMM_MAX_TOKENS
