"""Which of the Gluon kernels multiplies packed weights with so many tokens. Needs triton.

Their launchers have the same functions, ``fits`` and ``gemm``. The narrow kernel takes up to 8
tokens; for more there is the wide kernel on sm_90, and the decode kernel elsewhere.
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
    """The launcher of the kernel; None if none can run, so that the plain Triton kernel must.

    Args:
        dtype: of the activations.
    """
    for launcher in LAUNCHERS:
        if launcher.fits(num_tokens, num_inputs, dtype, rate, processor):
            return launcher
    return None
