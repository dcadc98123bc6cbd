"""Where the table that all Gluon kernels look up in can be. Needs triton.

They need shared-memory gather, which the installed Triton has from 3.7.1 on, and room for the
quadrant, 32 times, in the shared memory of a multiprocessor.
"""

import torch
import triton

from qamw_kernels.ops.launcher import Processor

DTYPES = (torch.bfloat16, torch.float16)


def _has_gather() -> bool:
    if triton.knobs.runtime.interpret:  # the interpreter does not know Gluon
        return False
    try:
        from triton.experimental.gluon.language import shared_memory_descriptor
    except ImportError:
        return False
    return hasattr(shared_memory_descriptor, "gather")


HAS_GATHER = _has_gather()
"""Whether the installed Triton can compile these kernels."""


def registers(warps: int) -> int:
    """That a thread may have where a multiprocessor has so many warps.

    Left to itself, the compiler would use fewer and spill others.
    """
    return min(65536 // (32 * warps), 255)


def table_bytes(index_bits: int) -> int:
    """Shared memory of the table."""
    return 128 << (index_bits - 2)


def fits(dtype: torch.dtype, index_bits: int, processor: Processor | None) -> bool:
    """Whether a processor has room for the table, and activations of ``dtype`` can be multiplied.

    Args:
        processor: None for one that runs no compiled kernels.
    """
    if not HAS_GATHER or processor is None or dtype not in DTYPES:
        return False
    return table_bytes(index_bits) < processor.shared_memory
