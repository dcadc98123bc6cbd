# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no starred tuples)
"""How the kernels in Gluon decode: look-ups with few bank conflicts, few instructions per pair.

They need a Triton with shared-memory gather.

The entries are replicated over the banks of shared memory, so that every lane looks up in a bank of
its own; where there is no room for 32 copies, a few lanes share a bank. The layouts are chosen so
that a decoded word is a register of the matrix instruction's first operand: except for the bits of
a trellis path, nothing moves between lanes.

RATE is (index bits, entry bits, copies of every entry), of :func:`.table.rate_constants`.
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


@gluon.constexpr_function
def is_trellis(RATE):
    """Whether RATE is one of the trellis; see ``ops.tiling``."""
    return RATE[0] - RATE[1] == 1


@gluon.constexpr_function
def sign_word(PAIR, RATE):
    """Which word of :func:`sign_words` has the signs of a pair."""
    return PAIR % 4 // 2 if is_trellis(RATE) else PAIR // 16


@gluon.constexpr_function
def sign_shift(PAIR, RATE):
    """How far left that word must be shifted to have a pair's signs at bits 31 and 15."""
    return 15 - (8 * (PAIR % 2) + PAIR // 4) if is_trellis(RATE) else PAIR % 16


@gluon.jit
def permute(low, high, selector):
    """Four of the eight bytes of high:low, chosen by the hexadecimal digits of ``selector``."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], gl.int32, True, 1
    )


@gluon.jit
def two_slots_before(words):
    """For every slot, the word of the slot two before it; 0 for the first two of every four lanes.

    A thread has four slots in a row, so half of the words stay in their lane. All lanes of the warp
    must take part.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred inside;
        .reg .b32 from_lane;
        shfl.sync.up.b32 from_lane|inside, $6, 1, 0x1c00, 0xffffffff;
        selp.b32 $0, from_lane, 0, inside;
        shfl.sync.up.b32 from_lane|inside, $7, 1, 0x1c00, 0xffffffff;
        selp.b32 $1, from_lane, 0, inside;
        mov.b32 $2, $4;
        mov.b32 $3, $5;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [words],
        gl.int32,
        False,
        4,
    )


@gluon.jit
def sign_words(words, FIRST: gl.constexpr, RATE: gl.constexpr):
    """Two words with the signs of the pairs of every slot: see :func:`sign_word`.

    words: of a slot; from number FIRST on they are those behind the entries.
    """
    if is_trellis(RATE):
        # Four bytes are four steps of 8 paths; permute() gives those one, two, three before.
        path = words[FIRST]
        before = two_slots_before(path)
        y = path ^ permute(path, before, 0x1076) ^ permute(path, before, 0x0765)
        x = y ^ permute(path, before, 0x2107)
        signs = (permute(x, y, 0x5410), permute(x, y, 0x7632))
    else:
        signs = ()
        for j in gl.static_range(FIRST, len(words)):
            signs = signs + (words[j],)
    return signs


@gluon.jit
def bank_of(lane, RATE: gl.constexpr):
    """Offset in bytes, among the copies of an entry, of the copy that a lane reads."""
    if RATE[2] < 32:
        lane = lane % RATE[2]
    return lane * 4


@gluon.constexpr_function
def log_entry_bytes(COPIES):
    """Log2 of the bytes that all copies of an entry take."""
    return (4 * COPIES).bit_length() - 1


@gluon.jit
def entry_address(words, bank, PAIR: gl.constexpr, RATE: gl.constexpr):
    """Byte address in the table of the entry of pair PAIR of every slot, in the lane's bank."""
    ENTRY_BITS: gl.constexpr = RATE[1]
    WORD: gl.constexpr = ENTRY_BITS * PAIR // 32
    SHIFT: gl.constexpr = ENTRY_BITS * PAIR % 32
    LOG: gl.constexpr = log_entry_bytes(RATE[2])
    if SHIFT < LOG:
        entry = words[WORD] << (LOG - SHIFT)
    elif SHIFT + ENTRY_BITS <= 32:
        entry = words[WORD] >> (SHIFT - LOG)
    else:
        high = words[WORD + 1].to(gl.uint32, bitcast=True) << (32 + LOG - SHIFT)
        low = words[WORD].to(gl.uint32, bitcast=True) >> (SHIFT - LOG)
        entry = (high | low).to(gl.int32, bitcast=True)
    MASK: gl.constexpr = ((1 << ENTRY_BITS) - 1) << LOG
    return (entry & MASK) | bank


@gluon.jit
def look_up(table, words, signs, bank, PAIR: gl.constexpr, RATE: gl.constexpr):
    """Codewords of pair PAIR of every slot."""
    address = entry_address(words, bank, PAIR, RATE)
    pair_signs = signs[sign_word(PAIR, RATE)] << sign_shift(PAIR, RATE)
    return table.gather(address >> 2, 0) ^ (pair_signs & -0x7FFF8000)


@gluon.jit
def to_float16(word):
    """A bfloat16 in the upper half of each int32, as a float16 in the lower half."""
    value = word.to(gl.float32, bitcast=True).to(gl.float16)
    return value.to(gl.uint16, bitcast=True).to(gl.int32)


@gluon.jit
def load_entries(p_entries, RATE: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr):
    """The table of all entries' copies, one entry after the other, as two DTYPE per int32."""
    BLOCKED: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    entry = gl.arange(0, RATE[2] << RATE[1], BLOCKED) // RATE[2]
    word = gl.load(p_entries + entry)
    if gl.float16 == DTYPE:  # codewords are exact in both
        x = to_float16(word << 16)
        y = to_float16(word & -0x10000)
        word = x | (y << 16)
    return word


@gluon.jit
def make_table(RATE: gl.constexpr):
    """Shared memory of the table."""
    BANKS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    return gl.allocate_shared_memory(gl.int32, [RATE[2] << RATE[1]], BANKS)


@gluon.jit
def load_words(p_words, m_tile, INDEX_BITS: gl.constexpr, WHOLE: gl.constexpr):
    """The INDEX_BITS words of every slot; unless WHOLE, zeros for warps where not ``m_tile``.

    They are read once, so they bypass L1 (.cg), which holds the activations.
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
    bank,
    chunk: gl.constexpr,
    RATE: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """acc + one chunk per warp times its activations, of every part.

    words: entries, those of chunk 0 first.
    signs: of :func:`sign_words`.
    """
    MMA: gl.constexpr = acc[0].type.layout
    operands = ()
    for part in gl.static_range(len(acc)):
        operands = operands + gl.split(x[part].reshape([WARPS, 32, 2, 2]).permute([0, 1, 3, 2]))
    for h in gl.static_range(2):
        decoded = look_up(table, words, signs, bank, 2 * chunk + h, RATE)
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
def write(y, n, m, p_row_norms, p_bias, p_y, M, N, has_bias, DTYPE: gl.constexpr):
    """Scale the sums of rows ``n`` and tokens ``m``, add the bias, and store them.

    M * N is below 2**31.
    """
    y *= gl.load(p_row_norms + n, mask=n < N, other=0.0).expand_dims(1)
    y += gl.load(p_bias + n, mask=n < N * has_bias, other=0.0).to(gl.float32).expand_dims(1)
    o_y = m.expand_dims(0) * N + n.expand_dims(1)
    gl.store(p_y + o_y, y.to(DTYPE), mask=(n < N).expand_dims(1) & (m < M).expand_dims(0))
