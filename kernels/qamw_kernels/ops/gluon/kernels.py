# mypy: ignore-errors
# ruff: noqa: RUF005, SIM300  (Gluon knows no starred tuples)
"""The decode GEMM in Gluon: look-ups without bank conflicts, and few instructions per pair.

It needs a Triton with shared-memory gather.

The quadrant is replicated over the 32 banks of shared memory, so that every lane looks up in a bank
of its own. The layouts are chosen so that a decoded word is a register of the matrix instruction's
first operand: nothing moves between lanes. The warps of a program are shared out among some row
tiles. Those of one take turns with the tiles along the inputs, as a batched product, and their sums
are added at the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def halves(words, DTYPE: gl.constexpr):
    """The two 16 bit floats of int32 ``words``, in a last dimension."""
    low = words.to(gl.int16).to(DTYPE, bitcast=True)
    high = (words >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.join(low, high)


@gluon.jit
def entry_address(words, lane4, PAIR: gl.constexpr, ENTRY_BITS: gl.constexpr):
    """Where in the table the entry of pair PAIR of every slot is, for a lane: 128 bytes each."""
    WORD: gl.constexpr = ENTRY_BITS * PAIR // 32
    SHIFT: gl.constexpr = ENTRY_BITS * PAIR % 32
    if SHIFT < 7:
        entry = words[WORD] << (7 - SHIFT)
    elif SHIFT + ENTRY_BITS <= 32:
        entry = words[WORD] >> (SHIFT - 7)
    else:
        high = words[WORD + 1].to(gl.uint32, bitcast=True) << (39 - SHIFT)
        low = words[WORD].to(gl.uint32, bitcast=True) >> (SHIFT - 7)
        entry = (high | low).to(gl.int32, bitcast=True)
    MASK: gl.constexpr = ((1 << ENTRY_BITS) - 1) << 7
    return (entry & MASK) | lane4


@gluon.jit
def look_up(table, words, signs, lane4, PAIR: gl.constexpr, ENTRY_BITS: gl.constexpr):
    """Codewords of pair PAIR of every slot; ``signs`` has the pair's signs at bits 31 and 15."""
    address = entry_address(words, lane4, PAIR, ENTRY_BITS)
    return table.gather(address >> 2, 0) ^ (signs & -0x7FFF8000)


@gluon.jit
def to_float16(word):
    """A bfloat16 in the upper half of each int32, as a float16 in the lower half."""
    value = word.to(gl.float32, bitcast=True).to(gl.float16)
    return value.to(gl.uint16, bitcast=True).to(gl.int32)


@gluon.jit
def load_quadrant(p_quadrant, ENTRY_BITS: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr):
    """The quadrant [32 * C / 4] int32, every word 32 times, as two DTYPE per word."""
    entry = gl.arange(0, 32 << ENTRY_BITS, gl.BlockedLayout([4], [32], [WARPS], [0])) // 32
    word = gl.load(p_quadrant + entry)
    if DTYPE == gl.float16:  # codewords are exact in both
        x = to_float16(word << 16)
        y = to_float16(word & -0x10000)
        word = x | (y << 16)
    return word


@gluon.jit
def load_words(p_words, m_tile, INDEX_BITS: gl.constexpr, WHOLE: gl.constexpr):
    """The INDEX_BITS words of every slot; unless WHOLE, only of the warps where ``m_tile``.

    They are read once, and take no room in L1 (.cg): it holds the activations.
    """
    words = ()
    for j in gl.static_range(INDEX_BITS):
        if WHOLE:
            words = words + (gl.load(p_words + j * 128, cache_modifier=".cg"),)
        else:
            word = gl.load(p_words + j * 128, mask=m_tile, other=0, cache_modifier=".cg")
            words = words + (word,)
    return words


@gluon.jit
def multiply_chunk(
    acc,
    table,
    words,
    signs,
    x,
    lane4,
    chunk: gl.constexpr,
    ENTRY_BITS: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """acc + one chunk per warp times its activations, of every part.

    words: entries, those of chunk 0 first.
    signs: of the 16 pairs that this chunk's are among.
    """
    MMA: gl.constexpr = acc[0].type.layout
    operands = ()
    for part in gl.static_range(len(acc)):
        operands = operands + gl.split(x[part].reshape([WARPS, 32, 2, 2]).permute([0, 1, 3, 2]))
    for h in gl.static_range(2):
        pair_signs = signs << (2 * chunk % 16 + h)
        decoded = look_up(table, words, pair_signs, lane4, 2 * chunk + h, ENTRY_BITS)
        a = halves(decoded, DTYPE).reshape([WARPS, 8, 4, 2, 2, 2])
        a = a.permute([0, 4, 1, 3, 2, 5]).reshape([WARPS, 16, 16])
        a = gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
        sums = ()
        for part in gl.static_range(len(acc)):
            b = halves(operands[2 * part + h], DTYPE).reshape([WARPS, 8, 4, 2, 2])
            b = b.permute([0, 3, 2, 4, 1]).reshape([WARPS, 16, 8])
            b = gl.convert_layout(b, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
            sums = sums + (mma_v2(a, b, acc[part]),)
        acc = sums
    return acc


@gluon.jit
def multiply_tile(
    acc,
    table,
    words,
    p_x,
    chunks,
    lane4,
    ENTRY_BITS: gl.constexpr,
    WHOLE: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """acc + one tile per warp times its activations.

    Unless WHOLE, only the first ``chunks`` chunks exist.
    """
    for chunk in gl.static_range(16):
        x = ()
        for part in gl.static_range(len(acc)):
            if WHOLE:
                x = x + (gl.load(p_x[part] + chunk * 16),)
            else:
                x = x + (gl.load(p_x[part] + chunk * 16, mask=chunks > chunk, other=0),)
        signs = words[ENTRY_BITS + chunk // 8]
        acc = multiply_chunk(acc, table, words, signs, x, lane4, chunk, ENTRY_BITS, DTYPE, WARPS)
    return acc


@gluon.jit
def advance(pointers, step):
    """A tuple of pointers, each ``step`` elements on."""
    advanced = ()
    for i in gl.static_range(len(pointers)):
        advanced = advanced + (pointers[i] + step,)
    return advanced


@gluon.jit(
    do_not_specialize=["M", "N", "has_bias", "log_row_tiles"],
    do_not_specialize_on_alignment=["p_bias"],
)
def decode_gemm_kernel(
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
    log_row_tiles,
    INDEX_BITS: gl.constexpr,
    DTYPE: gl.constexpr,
    PARTS: gl.constexpr,
    WARPS: gl.constexpr,
    WARP_BASES: gl.constexpr,
):
    """y [M, N] = row_norms * (coordinates [N, K] @ x [M, K]^T)^T + bias.

    Program (i, j) has 8 * PARTS tokens and every num_programs-th run of row tiles.

    p_x: [M, K / 2] int32, two activations per word.
    log_row_tiles: a program takes 1 << log_row_tiles row tiles at once, WARPS at most.
    WARP_BASES: [[128], [256] ...], one for every bit of the warp.
    """
    ENTRY_BITS: gl.constexpr = INDEX_BITS - 2
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2]], [[4], [8], [16], [32], [64]], WARP_BASES, [], [WARPS * 128]
    )
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    BANKS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    table = gl.allocate_shared_memory(gl.int32, [32 << ENTRY_BITS], BANKS)
    table.store(load_quadrant(p_quadrant, ENTRY_BITS, DTYPE, WARPS))
    gl.barrier()

    index = gl.arange(0, WARPS * 128, WORDS)
    slot, lane, warp = index % 4, index // 4 % 32, index // 128
    log_share = len(WARP_BASES) - log_row_tiles
    share = 1 << log_share  # of the warps, for one row tile
    first_tile = warp & (share - 1)
    input_tiles = (K + 511) // 512
    whole = K // 512 - (K // 512 & (share - 1))
    first_token = gl.program_id(1) * (8 * PARTS)
    last_row_tile = (N + 15) // 16 - 1
    for run in range(gl.program_id(0), (last_row_tile >> log_row_tiles) + 1, gl.num_programs(0)):
        first_row_tile = run << log_row_tiles
        # Rows and tokens past the end are read again, and not written.
        row_tile = gl.minimum(first_row_tile + (warp >> log_share), last_row_tile).to(gl.int64)
        p_tile = p_tiles + (row_tile * input_tiles + first_tile) * (INDEX_BITS * 128)
        p_words = p_tile + lane * 4 + slot
        p_part, acc = (), ()
        for part in gl.static_range(PARTS):
            token = gl.minimum(first_token + 8 * part + lane // 4, M - 1).to(gl.int64)
            p_part = p_part + (p_x + token * (K // 2) + first_tile * 256 + lane % 4 * 4 + slot,)
            acc = acc + (gl.zeros([WARPS, 16, 8], gl.float32, MMA),)
        for _ in range(0, whole, share):
            words = load_words(p_words, True, INDEX_BITS, True)
            acc = multiply_tile(
                acc, table, words, p_part, 0, lane * 4, ENTRY_BITS, True, DTYPE, WARPS
            )
            p_words += share * INDEX_BITS * 128
            p_part = advance(p_part, share * 256)
        for tile in range(whole, input_tiles, share):
            # Not every warp has such a tile, and it may not be whole.
            m_tile = tile + first_tile < input_tiles
            words = load_words(p_words, m_tile, INDEX_BITS, False)
            chunks = K // 32 - (tile + first_tile) * 16
            acc = multiply_tile(
                acc, table, words, p_part, chunks, lane * 4, ENTRY_BITS, False, DTYPE, WARPS
            )
            p_words += share * INDEX_BITS * 128
            p_part = advance(p_part, share * 256)
        position = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))
        position = position.expand_dims(1).expand_dims(2) >> log_share
        for i in range(1 << log_row_tiles):
            row = first_row_tile + i
            for part in gl.static_range(PARTS):
                sums = gl.sum(gl.where(position == i, acc[part], 0.0), 0)
                n = row * 16 + gl.arange(0, 16, gl.SliceLayout(1, sums.type.layout))
                m = gl.arange(0, 8, gl.SliceLayout(0, sums.type.layout))
                m += first_token + 8 * part
                write(sums, n, m, p_row_norms, p_bias, p_y, M, N, has_bias, DTYPE)


@gluon.jit
def write(y, n, m, p_row_norms, p_bias, p_y, M, N, has_bias, DTYPE: gl.constexpr):
    """Scale the sums of rows ``n`` and tokens ``m``, add the bias, and store them.

    M * N is below 2**31.
    """
    y *= gl.load(p_row_norms + n, mask=n < N, other=0.0).expand_dims(1)
    y += gl.load(p_bias + n, mask=n < N * has_bias, other=0.0).to(gl.float32).expand_dims(1)
    o_y = m.expand_dims(0) * N + n.expand_dims(1)
    gl.store(p_y + o_y, y.to(DTYPE), mask=(n < N).expand_dims(1) & (m < M).expand_dims(0))
