# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The Triton kernels that rotate activations; see :mod:`qamw_kernels.ops.triton.rotate_launch`.

Shapes: M tokens, K inputs (a multiple of 64), B = rotation_block_size, G = K / B. As in
:mod:`qamw_kernels.ops.triton.kernels`, kernels are not specialized on sizes.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from qamw_kernels.ops.triton.arithmetic import cast, dot, hadamard_sign


@triton.jit
def hadamard_tile(WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """The +1/-1 Sylvester matrix [WIDTH, WIDTH].

    The tile at (i0, j0) of a larger one is this times hadamard_sign(i0 & j0), because the low
    and the high bits of the indices contribute to the sign separately.
    """
    i = tl.arange(0, WIDTH)
    return cast(hadamard_sign(i[:, None] & i[None, :]), DTYPE)


@triton.jit
def swapped(pair):
    """Where a pair of inputs is, in the order of :mod:`qamw_kernels.ops.gluon.wide_kernels`."""
    return (pair & ~0xF) | ((pair & 0x3) << 2) | ((pair & 0xC) >> 2)


@triton.jit(do_not_specialize=["R", "G"])
def rotate_kernel(
    p_x,
    p_input_scales,
    p_out,
    R,
    G,
    scale,
    B: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
    SWAPPED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Hadamard transform of every rotation block of x [R, B], R = M * G.

    Program (i, j) writes [BLOCK_R, WIDTH]. Row r of x is block r % G of its token, so one token
    alone already fills a tensor-core tile.

    SWAPPED: write the inputs in the order of :mod:`qamw_kernels.ops.gluon.wide_kernels`.
    EARLY: the next kernel may begin before this one is complete, and itself waits for it.
    """
    if EARLY:
        gdc_launch_dependents()
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j0 = tl.program_id(1) * WIDTH
    m_r = r < R
    # The pieces of a block, each with the sign of its tile of the matrix, are added up before they
    # are multiplied: everything is loaded at once, and there is only one product.
    piece = tl.arange(0, B // WIDTH) * WIDTH
    o_i = piece[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
    m_i = m_r[:, None, None]
    x = tl.load(p_x + r.to(tl.int64)[:, None, None] * B + o_i, mask=m_i, other=0.0)
    input_scales = tl.load(p_input_scales + (r % G)[:, None, None] * B + o_i, mask=m_i, other=0.0)
    # Multiplied with scale = B ** -0.5 before the rounding to DTYPE: then an operand overflows only
    # where some output does too.
    signs = (scale * hadamard_sign(piece & j0))[None, :, None]
    operand = tl.sum(x.to(tl.float32) * input_scales.to(tl.float32) * signs, 1)
    acc = tl.zeros([BLOCK_R, WIDTH], dtype=tl.float32)
    acc = dot(cast(operand, DTYPE), hadamard_tile(WIDTH, DTYPE), acc)
    if SWAPPED:
        # K is a multiple of 32, so a pair's number in x and its number in its token have the same
        # low bits. The two inputs of a pair stay together, and are stored at once.
        o_pair = r.to(tl.int64)[:, None] * (B // 2) + (j0 // 2 + tl.arange(0, WIDTH // 2))[None, :]
        o_out = swapped(o_pair)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        out = cast(acc, DTYPE).reshape([BLOCK_R, WIDTH // 2, 2])
        tl.store(p_out + o_out, out, mask=m_i)
    else:
        o_out = r.to(tl.int64)[:, None] * B + (j0 + tl.arange(0, WIDTH))[None, :]
        tl.store(p_out + o_out, cast(acc, DTYPE), mask=m_r[:, None])


@triton.jit
def butterfly(pieces, STEP: tl.constexpr):
    """One step of the Hadamard transform: combines the tensors whose numbers differ by STEP."""
    out = ()
    for i in tl.static_range(len(pieces)):
        if i & STEP:
            out = out + (pieces[i ^ STEP] - pieces[i],)
        else:
            out = out + (pieces[i] + pieces[i ^ STEP],)
    return out


@triton.jit
def rotate_tokens(p_x, o_x, m_x, factors, hadamard, DTYPE: tl.constexpr):
    """Hadamard transform of a span of inputs of some tokens: pieces [tokens, 64] in DTYPE.

    o_x, m_x: [tokens, 64], offsets and mask of the first piece of the span.
    factors: [64] for each piece.
    hadamard: [64, 64] in DTYPE.
    """
    pieces = ()
    for i in tl.static_range(len(factors)):
        x = tl.load(p_x + o_x + i * 64, mask=m_x, other=0.0)
        pieces = pieces + (x.to(tl.float32) * factors[i][None, :],)
    for log in tl.static_range(3):
        if 1 << log < len(factors):
            pieces = butterfly(pieces, 1 << log)
    out = ()
    for i in tl.static_range(len(factors)):
        acc = tl.zeros(pieces[i].shape, dtype=tl.float32)
        out = out + (cast(dot(cast(pieces[i], DTYPE), hadamard, acc), DTYPE),)
    return out


@triton.jit(do_not_specialize=["num_slots", "slots_per_token", "spans"])
def rotate_many_kernel(
    p_x,
    p_input_scales,
    p_slots,
    p_num_sorted,
    p_out,
    num_slots,
    slots_per_token,
    spans,
    scale,
    B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
    SORTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The same as :func:`rotate_kernel`, swapped, for many tokens.

    Program (i, j) has span j of the inputs (a rotation block, or 64 inputs with all their blocks)
    of every num_programs-th block of tokens, so that it makes the matrix only once.

    SORTED: out [sorted slots, K] has the tokens in the order of the sorted slots, see
        :mod:`qamw_kernels.ops.routing`; slot s has token s // slots_per_token. Padding is not
        written. Otherwise it has the tokens [num_slots, K] as they are.
    """
    if EARLY:
        gdc_launch_dependents()
    SPAN: tl.constexpr = B if B > 64 else 64
    first_input = tl.program_id(1) * SPAN
    i = tl.arange(0, 64)
    factors = ()
    for piece in tl.static_range(SPAN // 64):
        input_scales = tl.load(p_input_scales + first_input + piece * 64 + i)
        factors = factors + (input_scales.to(tl.float32) * scale,)
    hadamard = hadamard_sign(i[:, None] & i[None, :] & (B - 1))
    if B < 64:
        hadamard = tl.where(i[:, None] // B == i[None, :] // B, hadamard, 0.0)
    hadamard = cast(hadamard, DTYPE)
    column = (first_input + i)[None, :]
    end = num_slots
    if SORTED:
        end = tl.load(p_num_sorted)
    for first in range(tl.program_id(0) * BLOCK_M, end, tl.num_programs(0) * BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        token, m_token = place, place < end
        if SORTED:
            slot = tl.load(p_slots + place, mask=m_token, other=num_slots)
            token, m_token = slot // slots_per_token, slot < num_slots
        o_x = token.to(tl.int64)[:, None] * (spans * SPAN) + column
        out = rotate_tokens(p_x, o_x, m_token[:, None], factors, hadamard, DTYPE)
        o_out = place.to(tl.int64)[:, None] * (spans * SPAN) + column
        for piece in tl.static_range(SPAN // 64):
            # Dimensions of inputs: (which 16 pairs, bits 2 and 3 of the pair, bits 0 and 1, half).
            pairs = out[piece].reshape([BLOCK_M, 2, 4, 4, 2]).permute(0, 1, 3, 2, 4)
            pairs = pairs.reshape([BLOCK_M, 64])
            tl.store(p_out + o_out + piece * 64, pairs, mask=m_token[:, None])
