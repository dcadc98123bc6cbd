# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The Triton kernels; :mod:`qamw_kernels.ops.triton.launch` holds their tiles and launchers.

All readers of packed weights decode through :func:`decode_chunk`, except those in
:mod:`qamw_kernels.ops.gluon`. Shapes: M tokens, N rows, K inputs (a multiple of 64),
B = rotation_block_size, G = K / B. ``tiles`` are those of :mod:`qamw_kernels.ops.tiling`, with E
bits of an index for the codebook entry; a chunk is 32 inputs. Sizes are not specialized on, so that
:mod:`qamw_kernels.ops.warm_up` can compile everything that a model will ever launch.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

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
def load_pairs(p_words, pair, ENTRY_BITS: tl.constexpr, p_quadrant):
    """Codewords of pair ``pair`` of the slots whose word 0 ``p_words`` points at.

    Returns two bfloat16 in an int32 each.
    """
    bit = pair * ENTRY_BITS
    shift = bit % 32
    p_entry = p_words + (bit // 32) * 128
    low = tl.load(p_entry).to(tl.uint32, bitcast=True) >> shift
    # of the next word; where the entry ends in this one, the mask below removes it
    high = (tl.load(p_entry + 128).to(tl.uint32, bitcast=True) << 1) << (31 - shift)
    entry = (low | high).to(tl.int32, bitcast=True) & ((1 << ENTRY_BITS) - 1)
    signs = tl.load(p_words + (ENTRY_BITS + pair // 16) * 128) << (pair % 16)
    return tl.load(p_quadrant + entry) ^ (signs & -0x7FFF8000)  # bits 31 and 15


@triton.jit
def decode_chunk(
    p_tiles,
    p_quadrant,
    row_tile,
    chunk,
    NUM_ROW_TILES,
    NUM_INPUT_TILES,
    INDEX_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Coordinates [16 * R, 32] in DTYPE of the row tiles ``row_tile`` [R] and one chunk.

    They are exact in all three dtypes. Row tiles past the end are read as the last one.

    p_quadrant: [C / 4] int32, two bfloat16 per word, x in the low half.
    """
    ROW_TILES: tl.constexpr = row_tile.shape[0]
    first = tl.minimum(row_tile, NUM_ROW_TILES - 1).to(tl.int64) * NUM_INPUT_TILES + chunk // 16
    p_words = p_tiles + first[:, None] * (INDEX_BITS * 128) + tl.arange(0, 128)[None, :]
    pair = 2 * (chunk % 16)
    word = tl.join(
        load_pairs(p_words, pair, INDEX_BITS - 2, p_quadrant),
        load_pairs(p_words, pair + 1, INDEX_BITS - 2, p_quadrant),
    )
    if DTYPE.is_bf16():
        x = word.to(tl.int16).to(tl.bfloat16, bitcast=True)
        y = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:  # a bfloat16 is the upper half of a float32
        x = (word << 16).to(tl.float32, bitcast=True).to(DTYPE)
        y = ((word >> 16) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    # row tile, g, t, k8, r8, h, half
    coordinates = tl.reshape(tl.join(x, y), [ROW_TILES, 8, 4, 2, 2, 2, 2])
    return tl.reshape(tl.permute(coordinates, (0, 4, 1, 2, 5, 3, 6)), [ROW_TILES * 16, 32])


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


@triton.jit
def hadamard_tile(WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """The +1/-1 Sylvester matrix [WIDTH, WIDTH].

    The tile at (i0, j0) of a larger one is this times hadamard_sign(i0 & j0): the bits of the index
    split.
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
    EARLY: the next kernel may begin, and waits for this one by itself.
    """
    if EARLY:
        gdc_launch_dependents()
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j0 = tl.program_id(1) * WIDTH
    m_r = r < R
    # The pieces of a block are added up before they are multiplied, with the signs of the tile of
    # the matrix that is theirs: everything is loaded at once, and there is one product.
    piece = tl.arange(0, B // WIDTH) * WIDTH
    o_i = piece[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
    m_i = m_r[:, None, None]
    x = tl.load(p_x + r.to(tl.int64)[:, None, None] * B + o_i, mask=m_i, other=0.0)
    input_scales = tl.load(p_input_scales + (r % G)[:, None, None] * B + o_i, mask=m_i, other=0.0)
    # scale = B ** -0.5 before the rounding to DTYPE: then an operand overflows only where some
    # output does too.
    signs = (scale * hadamard_sign(piece & j0))[None, :, None]
    operand = tl.sum(x.to(tl.float32) * input_scales.to(tl.float32) * signs, 1)
    acc = tl.zeros([BLOCK_R, WIDTH], dtype=tl.float32)
    acc = dot(cast(operand, DTYPE), hadamard_tile(WIDTH, DTYPE), acc)
    if SWAPPED:
        # K is a multiple of 32, so these bits of the pair are those of the input. The two of a pair
        # stay together, and are stored at once.
        o_pair = r.to(tl.int64)[:, None] * (B // 2) + (j0 // 2 + tl.arange(0, WIDTH // 2))[None, :]
        o_out = swapped(o_pair)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        out = cast(acc, DTYPE).reshape([BLOCK_R, WIDTH // 2, 2])
        tl.store(p_out + o_out, out, mask=m_i)
    else:
        o_out = r.to(tl.int64)[:, None] * B + (j0 + tl.arange(0, WIDTH))[None, :]
        tl.store(p_out + o_out, cast(acc, DTYPE), mask=m_r[:, None])


@triton.jit
def butterfly(pieces, STEP: tl.constexpr):
    """One step of the Hadamard transform of some tensors, those whose numbers differ by STEP."""
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

    o_x, m_x: [tokens, 64], where the first piece of the span is.
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

    Program (i, j) has span j of the inputs, a rotation block or all blocks of 64 inputs, of every
    so many blocks of tokens: it makes the matrix once.

    SORTED: out [sorted slots, K] has the tokens of slots in their order, see
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
            # Inputs are (16 pairs, bits 2 and 3 of the pair, bits 0 and 1, half).
            pairs = out[piece].reshape([BLOCK_M, 2, 4, 4, 2]).permute(0, 1, 3, 2, 4)
            pairs = pairs.reshape([BLOCK_M, 64])
            tl.store(p_out + o_out + piece * 64, pairs, mask=m_token[:, None])


@triton.jit
def coordinates_times(
    p_tiles,
    p_quadrant,
    row_tile,
    p_x,
    m_x,
    N,
    K,
    INDEX_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Coordinates of the row tiles ``row_tile`` [R] times the vectors [K] at ``p_x`` [BLOCK_M].

    Returns [16 * R, BLOCK_M] float32. The weights are the first operand: the few tokens of a decode
    step are then the dimension that may be small.
    """
    acc = tl.zeros([row_tile.shape[0] * 16, BLOCK_M], dtype=tl.float32)
    for chunk in range(K // 32):
        coordinates = decode_chunk(
            p_tiles,
            p_quadrant,
            row_tile,
            chunk,
            tl.cdiv(N, 16),
            tl.cdiv(K, 512),
            INDEX_BITS,
            DTYPE,
        )
        k = chunk * 32 + tl.arange(0, 32)
        x = tl.load(p_x[None, :] + k[:, None], mask=m_x[None, :], other=0.0)  # [32, BLOCK_M]
        acc = dot(coordinates, x, acc)
    return acc


@triton.jit(do_not_specialize=["M", "N", "has_bias"], do_not_specialize_on_alignment=["p_bias"])
def gemm_kernel(
    p_x,
    p_tiles,
    p_row_norms,
    p_quadrant,
    p_bias,
    p_y,
    M,
    N,
    K,
    has_bias,
    INDEX_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    """y [M, N] = row_norms * (coordinates [N, K] @ x [M, K]^T)^T + bias.

    Program (i, j) writes [16 * ROW_TILES, BLOCK_M].
    """
    row_tile = tl.program_id(0) * ROW_TILES + tl.arange(0, ROW_TILES)
    n = tl.program_id(0) * (ROW_TILES * 16) + tl.arange(0, ROW_TILES * 16)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_tokens = p_x + m.to(tl.int64) * K
    acc = coordinates_times(
        p_tiles,
        p_quadrant,
        row_tile,
        p_tokens,
        m < M,
        N,
        K,
        INDEX_BITS,
        DTYPE,
        BLOCK_M,
    )
    m_n = n < N
    acc *= tl.load(p_row_norms + n, mask=m_n, other=0.0)[:, None]
    acc += tl.load(p_bias + n, mask=n < N * has_bias, other=0.0).to(tl.float32)[:, None]
    o_y = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(p_y + o_y, cast(acc, DTYPE), mask=m_n[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["num_slots", "slots_per_token", "N"])
def routed_gemm_kernel(
    p_x,
    p_tiles,
    p_row_norms,
    p_quadrant,
    p_slots,
    p_experts,
    p_num_sorted,
    p_y,
    num_slots,
    slots_per_token,
    N,
    K,
    INDEX_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    """y [slots, N]: row s is token s // slots_per_token times its expert's weight.

    Program (i, j) has the slots of block j, which have one expert; see
    :mod:`qamw_kernels.ops.routing`. Blocks behind the last, and experts of other ranks, are left
    out.
    """
    expert = tl.load(p_experts + tl.program_id(1)).to(tl.int64)
    if (tl.program_id(1) * BLOCK_M >= tl.load(p_num_sorted)) | (expert < 0):
        return
    row_tile = tl.program_id(0) * ROW_TILES + tl.arange(0, ROW_TILES)
    n = tl.program_id(0) * (ROW_TILES * 16) + tl.arange(0, ROW_TILES * 16)
    slot = tl.load(p_slots + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))
    m_slot = slot < num_slots
    p_expert = p_tiles + expert * tl.cdiv(N, 16) * tl.cdiv(K, 512) * (INDEX_BITS * 128)
    p_tokens = p_x + (slot // slots_per_token).to(tl.int64) * K
    acc = coordinates_times(
        p_expert,
        p_quadrant,
        row_tile,
        p_tokens,
        m_slot,
        N,
        K,
        INDEX_BITS,
        DTYPE,
        BLOCK_M,
    )
    m_n = n < N
    acc *= tl.load(p_row_norms + expert * N + n, mask=m_n, other=0.0)[:, None]
    tl.store(
        p_y + slot.to(tl.int64)[None, :] * N + n[:, None],
        cast(acc, DTYPE),
        mask=m_n[:, None] & m_slot[None, :],
    )


@triton.jit(do_not_specialize=["N"])
def dequantize_kernel(
    p_tiles,
    p_row_norms,
    p_input_scales,
    p_quadrant,
    p_weight,
    N,
    K,
    scale,
    INDEX_BITS: tl.constexpr,
    B: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    """weight [N, K] = row_norms * unrotate(coordinates) * input_scales.

    Program (i, j) writes [16 * ROW_TILES, WIDTH]. WIDTH is a rotation block, or a piece of a wide
    one, or two blocks of 16. Coordinates and +1/-1 are exact in bfloat16, so a bfloat16 product
    with float32 sums is float32 arithmetic.
    """
    row_tile = tl.program_id(0) * ROW_TILES + tl.arange(0, ROW_TILES)
    n = tl.program_id(0) * (ROW_TILES * 16) + tl.arange(0, ROW_TILES * 16)
    SPAN: tl.constexpr = B if B > WIDTH else WIDTH  # the inputs that a program's outputs depend on
    j0 = tl.program_id(1) * WIDTH % SPAN  # of the outputs, inside the span
    first = (tl.program_id(1) * WIDTH - j0) // 32
    i, j = tl.arange(0, 32), tl.arange(0, WIDTH)
    hadamard = hadamard_sign(i[:, None] & j[None, :] & (B - 1))
    if B < 32:
        hadamard = tl.where(i[:, None] // B == j[None, :] // B, hadamard, 0.0)
    hadamard = cast(hadamard, tl.bfloat16)
    acc = tl.zeros([ROW_TILES * 16, WIDTH], dtype=tl.float32)
    for chunk in range(SPAN // 32):
        coordinates = decode_chunk(
            p_tiles,
            p_quadrant,
            row_tile,
            first + chunk,
            tl.cdiv(N, 16),
            tl.cdiv(K, 512),
            INDEX_BITS,
            tl.bfloat16,
        )
        product = dot(coordinates, hadamard, tl.zeros([ROW_TILES * 16, WIDTH], dtype=tl.float32))
        # the bits of both indices above the tile's
        acc += product * hadamard_sign((32 * chunk) & (j0 + j))[None, :]
    k = tl.program_id(1) * WIDTH + j
    m_n = n < N
    row_norms = tl.load(p_row_norms + n, mask=m_n, other=0.0)
    input_scales = tl.load(p_input_scales + k).to(tl.float32)
    weight = acc * scale * row_norms[:, None] * input_scales[None, :]
    tl.store(
        p_weight + n.to(tl.int64)[:, None] * K + k[None, :],
        cast(weight, DTYPE),
        mask=m_n[:, None],
    )
