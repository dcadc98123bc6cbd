"""Where the table that all Gluon kernels look up in can be. Needs triton.

They need shared-memory gather, which the installed Triton has from 3.7.1 on, and room for many
copies of the entries in the shared memory of a multiprocessor.
"""

import torch
import triton

from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.weight import Rate

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


def copies(entry_bits: int) -> int:
    """Copies of every entry in the table.

    With 32, one for each bank, look-ups have no conflicts. The largest table has room for 16 only:
    two lanes may then need the same bank.
    """
    return 32 if entry_bits <= 10 else 16


def table_bytes(rate: Rate) -> int:
    """Shared memory of the table."""
    return 4 * copies(rate.entry_bits) << rate.entry_bits


def fits(dtype: torch.dtype, rate: Rate, processor: Processor | None) -> bool:
    """Whether a processor has room for the table, and activations of ``dtype`` can be multiplied.

    Args:
        processor: None for one that runs no compiled kernels.
    """
    if not HAS_GATHER or processor is None or dtype not in DTYPES:
        return False
    return table_bytes(rate) < processor.shared_memory
