"""Up to how many tokens the packed weight is multiplied directly. Needs triton.

With more tokens it is faster to decode the weight into a workspace and leave the rest to the
vendor's GEMM. Where the two ways take the same time depends on the GPU and on the kernel that the
installed Triton has; ``crossover.json`` holds what was measured in 16 bits, by
benchmarks/kernels/linear.py.
"""

import functools
import json
from pathlib import Path

import torch

from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.ops.gluon import decode_launch, narrow_launch, wide_launch
from qamw_kernels.ops.gluon.products import product_for
from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.weight import Rate

CROSSOVER_FILE = Path(__file__).with_name("crossover.json")
"""JSON object: :func:`crossover_key` -> tokens."""

GEMM_MAX_TOKENS = 16
"""The limit on a GPU that was not measured: with more tokens, the kernels for few tokens read the
activations so often that decoding the weight is cheaper. The wide kernel has a limit of its own."""


_NAMES = {wide_launch: "wide", decode_launch: "decode", None: "plain"}


def kernel_for_many(dtype: torch.dtype, rate: Rate, processor: Processor | None) -> str:
    """Name of the kernel for packed weights and more tokens than the narrow kernel takes."""
    num_tokens = narrow_launch.MAX_TOKENS + 1
    return _NAMES[product_for(num_tokens, UNIT_INPUTS, dtype, rate, processor)]


def crossover_key(device: torch.device, kernel: str) -> str:
    """What a measurement is valid for: the GPU, and :func:`kernel_for_many` on it."""
    return f"{torch.cuda.get_device_name(device)}, {kernel}"


@functools.cache
def gemm_max_tokens(
    device: torch.device,
    dtype: torch.dtype,
    rate: Rate,
    processor: Processor | None,
) -> int:
    """Tokens up to which multiplying with the packed weight is the faster way on that device."""
    kernel = kernel_for_many(dtype, rate, processor)
    limit = wide_launch.MAX_TOKENS if kernel == "wide" else GEMM_MAX_TOKENS
    measured: dict[str, int] = json.loads(CROSSOVER_FILE.read_text())
    if device.type != "cuda" or dtype.itemsize != 2 or not measured:
        return limit
    return measured.get(crossover_key(device, kernel), limit)
