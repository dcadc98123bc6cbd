"""Whether a GPU has room for the table that all Gluon kernels look up in. Needs triton.

The kernels need shared-memory gather, which Triton has from 3.7.1 on, and room for many copies of
the entries in the shared memory of a multiprocessor.
"""

import torch
import triton

from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.weight import Rate

DTYPES = (torch.bfloat16, torch.float16)
MIN_COPIES = 8
"""This many fit on every GPU from compute capability 8.0 on, at every rate."""


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
    """Registers that a thread may have if a multiprocessor runs so many warps.

    Without this option the compiler would use fewer registers, and spill others.
    """
    return min(65536 // (32 * warps), 255)


def copies(rate: Rate, shared_memory: int) -> int:
    """Copies of every entry in the table: as many as there is room for, 32 at most.

    With 32, one for each bank, look-ups have no conflicts. With fewer, lanes that need the same
    bank wait for each other.

    Args:
        shared_memory: bytes that one program may have.
    """
    room = shared_memory // (4 << rate.entry_bits)
    return min(32, 1 << room.bit_length() - 1) if room else 0


def table_bytes(rate: Rate, shared_memory: int) -> int:
    """Bytes that the table takes of the ``shared_memory`` bytes that one program may have."""
    return 4 * copies(rate, shared_memory) << rate.entry_bits


def rate_constants(rate: Rate, shared_memory: int) -> dict[str, int]:
    """Compile-time arguments of all kernels that look up in the table."""
    return {
        "INDEX_BITS": rate.index_bits,
        "ENTRY_BITS": rate.entry_bits,
        "COPIES": copies(rate, shared_memory),
    }


def fits(dtype: torch.dtype, rate: Rate, processor: Processor | None) -> bool:
    """Whether a processor has room for the table, and activations of ``dtype`` can be multiplied.

    Args:
        processor: None for one that runs no compiled kernels.
    """
    if not HAS_GATHER or processor is None or dtype not in DTYPES:
        return False
    return copies(rate, processor.shared_memory) >= MIN_COPIES
