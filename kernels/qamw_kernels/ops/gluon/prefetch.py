# mypy: ignore-errors
"""Bringing to L2 what a kernel will need: nothing waits for it, and it takes no registers.

Whole tiles need compute capability 9.0.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def prefetch(p, m, ASM: gl.constexpr):
    """Bring to L2 what is at the pointers ``p`` where ``m``. ASM: an instruction on address $1."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p " + ASM + " mov.b32 $0, 0; }",
        "=r,l,r",
        [p, m.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def prefetch_bytes(BYTES):
    """PTX of a prefetch of so many bytes."""
    return f"cp.async.bulk.prefetch.L2.global [$1], {BYTES};"


@gluon.jit
def prefetch_rows(p_rows, begin, end, WARPS: gl.constexpr):
    """Prefetch the row norms or biases of rows ``begin`` to ``end``: they are needed last."""
    row = begin + 8 * gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    prefetch(p_rows + row, row < end, "prefetch.global.L2 [$1];")
