"""Which of the Gluon kernels multiplies packed weights with so many tokens. Needs triton.

Their launchers have the same functions, ``fits`` and ``gemm``. On sm_90 the narrow kernel has up to
8 tokens and the wide one more; elsewhere it is the narrow and the decode kernel.
"""

from types import ModuleType

import torch

from qamw_kernels.ops.gluon import decode_launch, narrow_launch, wide_launch
from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.weight import Rate

LAUNCHERS = (narrow_launch, wide_launch, decode_launch)
"""The first that fits is the best."""


def product_for(
    num_tokens: int,
    num_inputs: int,
    dtype: torch.dtype,
    rate: Rate,
    processor: Processor | None,
) -> ModuleType | None:
    """The launcher of the kernel; None where none of them runs, but the plain Triton kernel.

    Args:
        dtype: of the activations.
    """
    for launcher in LAUNCHERS:
        if launcher.fits(num_tokens, num_inputs, dtype, rate, processor):
            return launcher
    return None
