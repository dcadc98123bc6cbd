# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels; :mod:`qamw_kernels.triton_launch` holds their tiles and launchers.

All three readers of packed weights (dequantise, skinny GEMM, prefill GEMM) decode through :func:`decode_tile`.
Shapes: M tokens, N rows, K inputs, U = K / 64 units, B = rotation_block_size, G = K / B. ``qweight`` is
[index_bits, N, U] int32. M (and M * G) is never specialised on: no batch size ever causes a compilation.
"""

import triton
import triton.language as tl

# Triton's interpreter (seen in 3.6 to 3.9) truncates float32 to bfloat16 instead of rounding, and tl.dot multiplies the
# raw bits of bfloat16 operands as integers. `cast` and `dot` work around both, for the interpreter only.
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
def load_field(p_qweight, o_words, m_words, plane_stride, LOW_BIT: tl.constexpr, WIDTH: tl.constexpr):
    """Bits LOW_BIT .. LOW_BIT + WIDTH - 1 of the indices, [BLOCK_N, 32 * UNITS] int32. Each word is loaded once.

    o_words, m_words: [BLOCK_N, UNITS], offset of a unit in a plane and whether it exists.
    """
    planes = (LOW_BIT + tl.arange(0, WIDTH)).to(tl.int64)
    o_field = o_words[:, :, None] + planes[None, None, :] * plane_stride
    words = tl.load(p_qweight + o_field, mask=m_words[:, :, None], other=0)  # [BLOCK_N, UNITS, WIDTH]
    shifts = tl.arange(0, 32 // WIDTH) * WIDTH
    fields = (words[:, :, :, None] >> shifts[None, None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(fields, [o_words.shape[0], o_words.shape[1] * 32]) << LOW_BIT


@triton.jit
def decode_tile(p_qweight, p_quadrant, n, u, N, U, INDEX_BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Coordinates [BLOCK_N, 64 * UNITS] in DTYPE (exact in all three) of rows ``n`` [BLOCK_N] and units ``u`` [UNITS].

    p_quadrant: [C / 4] int32, two bfloat16 per word, x in the low half. Rows and units past the end are index 0.
    """
    o_words = n.to(tl.int64)[:, None] * U + u[None, :]
    m_words = (n < N)[:, None] & (u < U)[None, :]
    plane_stride = tl.cast(N, tl.int64) * U  # N may be a constexpr 1
    index = tl.zeros([n.shape[0], u.shape[0] * 32], dtype=tl.int32)
    if INDEX_BITS & 8:  # the widest field holds the lowest bits
        index |= load_field(p_qweight, o_words, m_words, plane_stride, 0, 8)
    if INDEX_BITS & 4:
        index |= load_field(p_qweight, o_words, m_words, plane_stride, INDEX_BITS & 8, 4)
    if INDEX_BITS & 2:
        index |= load_field(p_qweight, o_words, m_words, plane_stride, INDEX_BITS & 12, 2)
    if INDEX_BITS & 1:
        index |= load_field(p_qweight, o_words, m_words, plane_stride, INDEX_BITS & 14, 1)
    word = tl.load(p_quadrant + (index & ((1 << (INDEX_BITS - 2)) - 1)))
    # The two top index bits are the signs of x and y: flip the sign bits of the low and of the high bfloat16.
    word ^= (((index >> (INDEX_BITS - 2)) & 1) << 15) ^ ((index >> (INDEX_BITS - 1)) << 31)
    if DTYPE.is_bf16():
        x = word.to(tl.int16).to(tl.bfloat16, bitcast=True)
        y = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:  # a bfloat16 is the upper half of a float32
        x = (word << 16).to(tl.float32, bitcast=True).to(DTYPE)
        y = ((word >> 16) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    return tl.reshape(tl.join(x, y), [n.shape[0], u.shape[0] * 64])  # pair p is inputs 2p, 2p + 1


@triton.jit
def hadamard_sign(v):
    """(-1) ** popcount(v) as float32, for v = i & j the element (i, j) of the Sylvester matrix; v < 2 ** 16."""
    v ^= v >> 8
    v ^= v >> 4
    v ^= v >> 2
    v ^= v >> 1
    return (1 - 2 * (v & 1)).to(tl.float32)


@triton.jit
def hadamard_tile(WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """The +1/-1 Sylvester matrix [WIDTH, WIDTH].

    Of a larger one, the tile at (i0, j0) is this times hadamard_sign(i0 & j0): the bits of the index split.
    """
    i = tl.arange(0, WIDTH)
    return cast(hadamard_sign(i[:, None] & i[None, :]), DTYPE)


@triton.jit(do_not_specialize=["R"])
def rotate_kernel(
    p_x, p_input_scales, p_out, R, G, scale,
    B: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):
    """Hadamard transform of every rotation block of x [R, B], R = M * G; program (i, j) writes [BLOCK_R, WIDTH].

    Row r of x is block r % G of its token, so one token alone already fills a tensor-core tile.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j0 = tl.program_id(1) * WIDTH
    m_r = (r < R)[:, None]
    hadamard = hadamard_tile(WIDTH, DTYPE)
    acc = tl.zeros([BLOCK_R, WIDTH], dtype=tl.float32)
    for i0 in range(0, B, WIDTH):
        i = i0 + tl.arange(0, WIDTH)
        x = tl.load(p_x + r.to(tl.int64)[:, None] * B + i[None, :], mask=m_r, other=0.0).to(tl.float32)
        input_scales = tl.load(p_input_scales + (r % G)[:, None] * B + i[None, :], mask=m_r, other=0.0).to(tl.float32)
        # scale = B ** -0.5 before the rounding to DTYPE: then an operand overflows only where some output does too.
        operand = cast(x * input_scales * (scale * hadamard_sign(i0 & j0)), DTYPE)
        acc = dot(operand, hadamard, acc)
    j = j0 + tl.arange(0, WIDTH)
    tl.store(p_out + r.to(tl.int64)[:, None] * B + j[None, :], cast(acc, DTYPE), mask=m_r)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    p_x, p_qweight, p_row_norms, p_quadrant, p_bias, p_y, M, N, U,
    INDEX_BITS: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):
    """y [M, N] = row_norms * (coordinates [N, K] @ x [M, K]^T)^T + bias, one [BLOCK_N, BLOCK_M] tile per program.

    The weights are the A operand: the few tokens of a decode step are then the dimension that may be small.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    K = U * 64
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for u0 in range(0, U, UNITS):
        coordinates = decode_tile(p_qweight, p_quadrant, n, u0 + tl.arange(0, UNITS), N, U, INDEX_BITS, DTYPE)
        k = u0 * 64 + tl.arange(0, UNITS * 64)
        m_x = (k < K)[:, None] & (m < M)[None, :]  # zeros past K silence the units past the end
        x = tl.load(p_x + m.to(tl.int64)[None, :] * K + k[:, None], mask=m_x, other=0.0)  # [BLOCK_K, BLOCK_M]
        acc = dot(coordinates, x, acc)
    m_n = n < N
    acc *= tl.load(p_row_norms + n, mask=m_n, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(p_bias + n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    o_y = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(p_y + o_y, cast(acc, DTYPE), mask=m_n[:, None] & (m < M)[None, :])


@triton.jit
def dequantize_kernel(
    p_qweight, p_row_norms, p_input_scales, p_quadrant, p_weight, N, U, scale,
    INDEX_BITS: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):
    """weight [N, K] = row_norms * unrotate(coordinates) * input_scales; program (i, j) writes [BLOCK_N, 64 * UNITS].

    Coordinates and +1/-1 are exact in bfloat16, so a bfloat16 product with float32 sums is float32 arithmetic. A
    rotation block is narrower than the tile (several per row), as wide, or wider (PIECES tiles, each decoded again).
    """
    BLOCK_K: tl.constexpr = UNITS * 64
    PIECES: tl.constexpr = (B + BLOCK_K - 1) // BLOCK_K
    ROWS: tl.constexpr = BLOCK_N * (BLOCK_K // WIDTH)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    piece = tl.program_id(1) % PIECES
    u0 = (tl.program_id(1) - piece) * UNITS  # first unit of the rotation block
    hadamard = hadamard_tile(WIDTH, tl.bfloat16)
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for i in range(PIECES):
        u = u0 + i * UNITS + tl.arange(0, UNITS)
        coordinates = decode_tile(p_qweight, p_quadrant, n, u, N, U, INDEX_BITS, tl.bfloat16)
        product = dot(tl.reshape(coordinates, [ROWS, WIDTH]), hadamard, tl.zeros([ROWS, WIDTH], dtype=tl.float32))
        acc += product * hadamard_sign(i & piece)  # the rotation block's PIECES x PIECES matrix of tiles
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n = n < N
    m_k = k < U * 64
    row_norms = tl.load(p_row_norms + n, mask=m_n, other=0.0)
    input_scales = tl.load(p_input_scales + k, mask=m_k, other=0.0).to(tl.float32)
    weight = tl.reshape(acc, [BLOCK_N, BLOCK_K]) * scale * row_norms[:, None] * input_scales[None, :]
    o_weight = n.to(tl.int64)[:, None] * (U * 64) + k[None, :]
    tl.store(p_weight + o_weight, cast(weight, DTYPE), mask=m_n[:, None] & m_k[None, :])
