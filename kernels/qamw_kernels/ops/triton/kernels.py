# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernels that decode; :mod:`qamw_kernels.ops.triton.launch` has tiles and launchers.

All readers of packed weights decode through :func:`decode_chunk`, except those in
:mod:`qamw_kernels.ops.gluon`. Shapes: M tokens, N rows, K inputs (a multiple of 64),
B = rotation_block_size, G = K / B. ``tiles`` are those of :mod:`qamw_kernels.ops.tiling`. Of the
INDEX_BITS, ENTRY_BITS are for the codebook entry; the plain code has two more, the trellis one. A
chunk is 32 inputs. Kernels are not specialized on sizes, so that :mod:`qamw_kernels.ops.warm_up`
can compile everything that a model will ever launch.
"""

import triton
import triton.language as tl

from qamw_kernels.ops.triton.arithmetic import cast, dot, hadamard_sign


@triton.jit
def load_signs(p_words, pair, INDEX_BITS: tl.constexpr, ENTRY_BITS: tl.constexpr):
    """The signs of pair ``pair`` of the slots [R, 128], at bits 31 (y) and 15 (x)."""
    p_first = p_words + ENTRY_BITS * 128
    if INDEX_BITS - ENTRY_BITS == 2:
        signs = tl.load(p_first + pair // 16 * 128) << (pair % 16)
    else:
        # A bit of the path; see qamw_kernels.codec.trellis for the signs that follow from it.
        continues = tl.arange(0, 128)[None, :] % 16 >= 2
        path = tl.load(p_first).to(tl.uint32, bitcast=True)
        before = tl.load(p_first - 2, mask=continues, other=0).to(tl.uint32, bitcast=True)
        y = path ^ ((path << 16) | (before >> 16)) ^ ((path << 24) | (before >> 8))
        x = y ^ ((path << 8) | (before >> 24))
        left = 31 - (8 * (pair % 4) + pair // 4)
        signs = ((y << left) & 0x80000000) | (((x << left) >> 16) & 0x8000)
        signs = signs.to(tl.int32, bitcast=True)
    return signs & -0x7FFF8000


@triton.jit
def load_pairs(p_words, pair, INDEX_BITS: tl.constexpr, ENTRY_BITS: tl.constexpr, p_entries):
    """Codewords of pair ``pair`` of the slots whose word 0 ``p_words`` [R, 128] points at.

    Returns two bfloat16 in an int32 each.
    """
    bit = pair * ENTRY_BITS
    shift = bit % 32
    p_entry = p_words + (bit // 32) * 128
    low = tl.load(p_entry).to(tl.uint32, bitcast=True) >> shift
    # of the next word; where the entry ends in this one, the mask below removes it
    high = (tl.load(p_entry + 128).to(tl.uint32, bitcast=True) << 1) << (31 - shift)
    entry = (low | high).to(tl.int32, bitcast=True) & ((1 << ENTRY_BITS) - 1)
    return tl.load(p_entries + entry) ^ load_signs(p_words, pair, INDEX_BITS, ENTRY_BITS)


@triton.jit
def decode_chunk(
    p_tiles,
    p_entries,
    row_tile,
    chunk,
    NUM_ROW_TILES,
    NUM_INPUT_TILES,
    INDEX_BITS: tl.constexpr,
    ENTRY_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Coordinates [16 * R, 32] in DTYPE of the row tiles ``row_tile`` [R] and one chunk.

    They are exact in all three dtypes. Row tiles past the end are read as the last one.

    p_entries: [2**ENTRY_BITS] int32, two bfloat16 per word, x in the low half.
    """
    ROW_TILES: tl.constexpr = row_tile.shape[0]
    first = tl.minimum(row_tile, NUM_ROW_TILES - 1).to(tl.int64) * NUM_INPUT_TILES + chunk // 16
    p_words = p_tiles + first[:, None] * (INDEX_BITS * 128) + tl.arange(0, 128)[None, :]
    pair = 2 * (chunk % 16)
    word = tl.join(
        load_pairs(p_words, pair, INDEX_BITS, ENTRY_BITS, p_entries),
        load_pairs(p_words, pair + 1, INDEX_BITS, ENTRY_BITS, p_entries),
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
def coordinates_times(
    p_tiles,
    p_entries,
    row_tile,
    p_x,
    m_x,
    N,
    K,
    INDEX_BITS: tl.constexpr,
    ENTRY_BITS: tl.constexpr,
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
            p_entries,
            row_tile,
            chunk,
            tl.cdiv(N, 16),
            tl.cdiv(K, 512),
            INDEX_BITS,
            ENTRY_BITS,
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
    p_entries,
    p_bias,
    p_y,
    M,
    N,
    K,
    has_bias,
    INDEX_BITS: tl.constexpr,
    ENTRY_BITS: tl.constexpr,
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
        p_entries,
        row_tile,
        p_tokens,
        m < M,
        N,
        K,
        INDEX_BITS,
        ENTRY_BITS,
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
    p_entries,
    p_slots,
    p_experts,
    p_num_sorted,
    p_y,
    num_slots,
    slots_per_token,
    N,
    K,
    INDEX_BITS: tl.constexpr,
    ENTRY_BITS: tl.constexpr,
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
        p_entries,
        row_tile,
        p_tokens,
        m_slot,
        N,
        K,
        INDEX_BITS,
        ENTRY_BITS,
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


@triton.jit(do_not_specialize=["units", "k"])
def combine_kernel(
    p_y, p_shares, p_out, units, k, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr
):
    """out [M, N] = the sum over k of y [M, k, N] * shares [M, k], one slot after the other.

    Program (i, j) has token i and BLOCK_N rows from BLOCK_N * j on. N is UNIT * ``units``: so the
    compiler knows that N is a multiple of UNIT, and loads several elements at once.
    """
    N = units * UNIT
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0).to(tl.int64) * k
    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    for i in range(k):
        y = tl.load(p_y + (first + i) * N + n, mask=n < N, other=0.0)
        acc += y.to(tl.float32) * tl.load(p_shares + first + i)
    tl.store(p_out + tl.program_id(0).to(tl.int64) * N + n, cast(acc, DTYPE), mask=n < N)


@triton.jit(do_not_specialize=["N"])
def dequantize_kernel(
    p_tiles,
    p_row_norms,
    p_input_scales,
    p_entries,
    p_weight,
    N,
    K,
    scale,
    INDEX_BITS: tl.constexpr,
    ENTRY_BITS: tl.constexpr,
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
            p_entries,
            row_tile,
            first + chunk,
            tl.cdiv(N, 16),
            tl.cdiv(K, 512),
            INDEX_BITS,
            ENTRY_BITS,
            tl.bfloat16,
        )
        product = dot(coordinates, hadamard, tl.zeros([ROW_TILES * 16, WIDTH], dtype=tl.float32))
        # the sign that the bits of the input's number above the chunk's contribute
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
