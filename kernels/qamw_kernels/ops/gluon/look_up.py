# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no starred tuples)
"""How the kernels in Gluon decode: look-ups without bank conflicts, few instructions per pair.

They need a Triton with shared-memory gather.

The quadrant is replicated over the 32 banks of shared memory, so that every lane looks up in a bank
of its own. The layouts are chosen so that a decoded word is a register of the matrix instruction's
first operand: nothing moves between lanes.
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
    if gl.float16 == DTYPE:  # codewords are exact in both
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
def write(y, n, m, p_row_norms, p_bias, p_y, M, N, has_bias, DTYPE: gl.constexpr):
    """Scale the sums of rows ``n`` and tokens ``m``, add the bias, and store them.

    M * N is below 2**31.
    """
    y *= gl.load(p_row_norms + n, mask=n < N, other=0.0).expand_dims(1)
    y += gl.load(p_bias + n, mask=n < N * has_bias, other=0.0).to(gl.float32).expand_dims(1)
    o_y = m.expand_dims(0) * N + n.expand_dims(1)
    gl.store(p_y + o_y, y.to(DTYPE), mask=(n < N).expand_dims(1) & (m < M).expand_dims(0))
