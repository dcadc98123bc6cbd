# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What several Triton kernels compute with, compiled or in Triton's interpreter."""

import triton
import triton.language as tl

# Triton's interpreter (seen in 3.6 to 3.9) truncates float32 to bfloat16 instead of rounding, and
# tl.dot multiplies the raw bits of bfloat16 operands as integers. `cast` and `dot` work around
# both, for the interpreter only. Triton decides at import between it and the compiler, so do these.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """``x`` float32 in DTYPE, rounded to nearest even."""
    if INTERPRETED and DTYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 accumulation; float32 operands are not narrowed to TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def hadamard_sign(v):
    """(-1) ** popcount(v) as float32, v < 2 ** 16.

    For v = i & j this is the element (i, j) of the Sylvester matrix.
    """
    v ^= v >> 8
    v ^= v >> 4
    v ^= v >> 2
    v ^= v >> 1
    return (1 - 2 * (v & 1)).to(tl.float32)
