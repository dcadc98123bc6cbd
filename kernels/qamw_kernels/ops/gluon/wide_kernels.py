# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no starred tuples)
"""The decode GEMM for up to 512 tokens on sm_90: decode once, multiply with many.

It needs a Triton with shared-memory gather, warpgroup products and tensor descriptors.

Words are decoded as in :mod:`qamw_kernels.ops.gluon.look_up`. Decoded words are registers of
wgmma's first operand, and the activations its second one, in shared memory: one copy for all warps,
brought there by the copy engine while the block before is multiplied. The operand's k is 16 h + 8
k8 + 2 t + half where lane t holds inputs 8 t + 4 h + 2 k8 + half, so the activations come swapped:
position p of 32 holds the input whose bits 1, 2 are bits 3, 4 of p, and the other way round.

A unit is one tile along the inputs of a row block, which has a row tile for every warp. Units are
in the order of memory, and every program takes as many as the others, from wherever the one before
it ends. A row block that several programs share is added up by :func:`add_sums_kernel`, in the
order of its inputs, so that a result does not depend on who was first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qamw_kernels.ops.gluon.look_up import entry_address, halves, load_quadrant, load_words, write

# Triton 3.9 has the first name, older ones the second.
copy_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def flip_signs(words, signs):
    """words ^ (signs & 0x80008000).

    It is one instruction here. Left to itself, the compiler makes two of it where it moves the
    signs ahead.
    """
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0x80008000, 0x78;", "=r,r,r", [words, signs], gl.int32, True, 1
    )


@gluon.jit
def decode_chunk(table, words, lane4, CHUNK: gl.constexpr, ENTRY_BITS: gl.constexpr):
    """Codewords of the two pairs that every slot has in a chunk, in a last dimension."""
    signs = words[ENTRY_BITS + CHUNK // 8] << (2 * CHUNK % 16)
    low = table.gather(entry_address(words, lane4, 2 * CHUNK, ENTRY_BITS) >> 2, 0)
    high = table.gather(entry_address(words, lane4, 2 * CHUNK + 1, ENTRY_BITS) >> 2, 0)
    return gl.join(flip_signs(low, signs), flip_signs(high, signs << 1))


@gluon.jit
def decode_stage(
    table,
    words,
    lane4,
    STAGE: gl.constexpr,
    STAGE_INPUTS: gl.constexpr,
    DTYPE: gl.constexpr,
    MMA: gl.constexpr,
):
    """Coordinates [16 * WARPS, STAGE_INPUTS] of one or two chunks of a tile, as first operand."""
    ENTRY_BITS: gl.constexpr = len(words) - 2
    WARPS: gl.constexpr = lane4.shape[0] // 128
    if STAGE_INPUTS == 32:
        decoded = decode_chunk(table, words, lane4, STAGE, ENTRY_BITS)
        a = halves(decoded, DTYPE).reshape([WARPS, 8, 4, 2, 2, 2, 2])  # ..., g, t, k8, r8, h, half
        a = a.permute([0, 4, 1, 5, 3, 2, 6])
    else:
        low = decode_chunk(table, words, lane4, 2 * STAGE, ENTRY_BITS)
        high = decode_chunk(table, words, lane4, 2 * STAGE + 1, ENTRY_BITS)
        a = halves(gl.join(low, high), DTYPE).reshape([WARPS, 8, 4, 2, 2, 2, 2, 2])
        a = a.permute([0, 4, 1, 6, 5, 3, 2, 7])  # the chunk came after h
    a = a.reshape([WARPS * 16, STAGE_INPUTS])
    return gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def renew_words(words, p_words, STAGE: gl.constexpr, STAGE_INPUTS: gl.constexpr):
    """``words``, those of them that STAGE was the last to need loaded from ``p_words``.

    So the next tile's words are on their way for most of a tile's time, and take no more registers.
    """
    ENTRY_BITS: gl.constexpr = len(words) - 2
    STAGE_PAIRS: gl.constexpr = STAGE_INPUTS // 16  # of a slot
    renewed = ()
    for j in gl.static_range(ENTRY_BITS):
        if (32 * j + 31) // ENTRY_BITS // STAGE_PAIRS == STAGE:
            renewed = renewed + (gl.load(p_words + j * 128),)
        else:
            renewed = renewed + (words[j],)
    for j in gl.static_range(2):
        if (16 * j + 15) // STAGE_PAIRS == STAGE:
            renewed = renewed + (gl.load(p_words + (ENTRY_BITS + j) * 128),)
        else:
            renewed = renewed + (words[ENTRY_BITS + j],)
    return renewed


@gluon.jit
def make_ring(x_blocks, RING: gl.constexpr, DTYPE: gl.constexpr):
    """The descriptor of the activations, places for blocks of them, and a barrier for each."""
    TOKENS: gl.constexpr = x_blocks.block_shape[0]
    BLOCK_INPUTS: gl.constexpr = x_blocks.block_shape[1]
    places = gl.allocate_shared_memory(DTYPE, [RING, TOKENS, BLOCK_INPUTS], x_blocks.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(RING):
        mbarrier.init(full.index(place), count=1)
    return x_blocks, places, full


@gluon.jit
def start_copy(ring, block, wanted, token, k):
    """Start the copy of a program's ``block``-th block of activations, from (token, k)."""
    x_blocks, places, full = ring
    place = block & (places.shape[0] - 1)
    mbarrier.expect(full.index(place), x_blocks.nbytes_per_cta, wanted)
    copy_block(x_blocks, [token, k], full.index(place), places.index(place), wanted)


@gluon.jit
def next_block(k, input_tiles, BLOCK_INPUTS: gl.constexpr):
    """The k of the block of activations after that at ``k``: of the next tile, or the first."""
    return gl.where(k + BLOCK_INPUTS < input_tiles * 512, k + BLOCK_INPUTS, 0)


@gluon.jit
def first_unit(program, programs, units, grain):
    """The first unit of a program: a multiple of ``grain``, which divides ``units``."""
    return program * (units // grain) // programs * grain


@gluon.jit
def tile_offset(row_block, tile, input_tiles, N, INDEX_BITS: gl.constexpr, WORDS: gl.constexpr):
    """Where the first words of a unit are for every slot.

    Rows past the end are read again, and not written.
    """
    index = gl.arange(0, WORDS.shape[0], WORDS)
    row_tile = gl.minimum(row_block * (WORDS.shape[0] // 128) + index // 128, (N + 15) // 16 - 1)
    first = row_tile.to(gl.int64) * input_tiles + tile
    return first * (INDEX_BITS * 128) + index % 128


@gluon.jit
def multiply_tile(
    acc,
    words,
    p_words,
    table,
    lane4,
    ring,
    block,
    blocks,
    token,
    k,
    input_tiles,
    STAGE_INPUTS: gl.constexpr,
):
    """acc + one tile per warp times its activations, and the words of the tile at ``p_words``.

    Also the number of the next block of activations, and the k of the block after that one, whose
    copy has not been started.
    """
    _, places, full = ring
    MMA: gl.constexpr = acc.type.layout
    RING: gl.constexpr = places.shape[0]
    BLOCK_INPUTS: gl.constexpr = places.shape[2]
    for s in gl.static_range(512 // STAGE_INPUTS):
        x = places.index(block & (RING - 1))
        x = x.slice(s * STAGE_INPUTS % BLOCK_INPUTS, STAGE_INPUTS, dim=1)
        if s * STAGE_INPUTS % BLOCK_INPUTS == 0:
            mbarrier.wait(full.index(block & (RING - 1)), block // RING & 1)
        a = decode_stage(table, words, lane4, s, STAGE_INPUTS, places.dtype, MMA)
        words = renew_words(words, p_words, s, STAGE_INPUTS)
        acc = warpgroup_mma(a, x.permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # all but this stage
        if s * STAGE_INPUTS % BLOCK_INPUTS == 0:
            gl.barrier()  # All warps have multiplied the block before this one: its place is free.
            start_copy(ring, block + RING - 1, block + RING - 1 < blocks, token, k)
            k = next_block(k, input_tiles, BLOCK_INPUTS)
        if (s + 1) * STAGE_INPUTS % BLOCK_INPUTS == 0:
            block += 1
    return acc, words, block, k


@gluon.jit
def write_sums(acc, row_block, begins, whole, token, output, p_sums, DTYPE: gl.constexpr):
    """Write y of a whole row block, or the program's sums of one that it shares.

    Of two row blocks that it may share with others, the one that it does not begin comes first.
    """
    ROWS: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    n = gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
    m = gl.arange(0, TOKENS, gl.SliceLayout(0, acc.type.layout))
    if whole:
        p_row_norms, p_bias, p_y, M, N, has_bias = output
        n += row_block * ROWS
        write(acc, n, token + m, p_row_norms, p_bias, p_y, M, N, has_bias, DTYPE)
    else:
        program = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        p_shared = p_sums + (program * 2 + begins.to(gl.int32)).to(gl.int64) * (TOKENS * ROWS)
        gl.store(p_shared + m.expand_dims(0) * ROWS + n.expand_dims(1), acc)


@gluon.jit(
    do_not_specialize=["M", "N", "has_bias", "grain"], do_not_specialize_on_alignment=["p_bias"]
)
def wide_gemm_kernel(
    p_tiles,
    x_blocks,
    p_row_norms,
    p_quadrant,
    p_bias,
    p_y,
    p_sums,
    M,
    N,
    K,
    has_bias,
    grain,
    INDEX_BITS: gl.constexpr,
    DTYPE: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCK_INPUTS: gl.constexpr,
    RING: gl.constexpr,
    STAGE_INPUTS: gl.constexpr,
    WARPS: gl.constexpr,
    WARP_BASES: gl.constexpr,
):
    """y [M, N] = row_norms * (coordinates [N, K] @ x [M, K]^T)^T + bias.

    Program (i, j) has TOKENS tokens and the i-th share of the units; of row blocks that it
    shares with others, the sums go to p_sums.

    x_blocks: descriptor of x [M, K], swapped, for blocks [TOKENS, BLOCK_INPUTS]; zeros past
        its ends.
    p_sums: float32, see :func:`add_sums_kernel`.
    grain: a program's units are a multiple of it, 1 or all of a row block.
    RING: blocks of activations in shared memory, a power of 2.
    WARP_BASES: [[128], [256] ...], one for every bit of the warp.
    """
    ENTRY_BITS: gl.constexpr = INDEX_BITS - 2
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2]], [[4], [8], [16], [32], [64]], WARP_BASES, [], [WARPS * 128]
    )
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, TOKENS, 16]
    )
    BANKS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    table = gl.allocate_shared_memory(gl.int32, [32 << ENTRY_BITS], BANKS)
    ring = make_ring(x_blocks, RING, DTYPE)

    input_tiles = (K + 511) // 512
    units = (N + WARPS * 16 - 1) // (WARPS * 16) * input_tiles
    first = first_unit(gl.program_id(0), gl.num_programs(0), units, grain)
    last = first_unit(gl.program_id(0) + 1, gl.num_programs(0), units, grain)
    first_block = first // input_tiles
    tile = first - first_block * input_tiles
    token = gl.program_id(1) * TOKENS
    start_copy(ring, 0, True, token, tile * 512)
    k = next_block(tile * 512, input_tiles, BLOCK_INPUTS)
    table.store(load_quadrant(p_quadrant, ENTRY_BITS, DTYPE, WARPS))
    gl.barrier()

    lane4 = gl.arange(0, WARPS * 128, WORDS) // 4 % 32 * 4
    o_words = tile_offset(first_block, tile, input_tiles, N, INDEX_BITS, WORDS)
    words = load_words(p_tiles + o_words, True, INDEX_BITS, True)
    output = (p_row_norms, p_bias, p_y, M, N, has_bias)
    block, blocks = 0, (last - first) * (512 // BLOCK_INPUTS)
    for row_block in range(first_block, (last + input_tiles - 1) // input_tiles):
        start = row_block * input_tiles
        begin, end = gl.maximum(first, start), gl.minimum(last, start + input_tiles)
        acc = gl.zeros([WARPS * 16, TOKENS], gl.float32, MMA)
        for unit in range(begin, end):
            # The words of the unit after this; after the last one, some that exist.
            ends = (unit + 1 == end).to(gl.int32)
            tile = (unit + 1 - start) * (1 - ends)
            o_words = tile_offset(row_block + ends, tile, input_tiles, N, INDEX_BITS, WORDS)
            p_words = p_tiles + o_words
            acc, words, block, k = multiply_tile(
                acc,
                words,
                p_words,
                table,
                lane4,
                ring,
                block,
                blocks,
                token,
                k,
                input_tiles,
                STAGE_INPUTS,
            )
        acc = warpgroup_mma_wait(0, deps=[acc])
        whole = end - begin == input_tiles
        write_sums(acc, row_block, begin == start, whole, token, output, p_sums, DTYPE)


@gluon.jit(
    do_not_specialize=["M", "N", "has_bias", "programs", "TOKENS"],
    do_not_specialize_on_alignment=["p_bias"],
)
def add_sums_kernel(
    p_sums,
    p_row_norms,
    p_bias,
    p_y,
    M,
    N,
    K,
    has_bias,
    programs,
    TOKENS,
    DTYPE: gl.constexpr,
    ROWS: gl.constexpr,
):
    """y of the row blocks that programs of :func:`wide_gemm_kernel` have shared.

    Program (i, j) has row block i, of ROWS rows, and 8 tokens.

    p_sums: [token groups, programs, 2, TOKENS, ROWS] float32. A program that ends a row block, but
        did not start it, has its sums of it in the first place, otherwise in the second.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [1, 4], [0, 1])
    row_block, group = gl.program_id(0), gl.program_id(1) * 8 // TOKENS
    input_tiles = (K + 511) // 512
    units = (N + ROWS - 1) // ROWS * input_tiles
    start = row_block * input_tiles
    first = ((start + 1) * programs - 1) // units
    last = ((start + input_tiles) * programs - 1) // units
    if first < last:
        n = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        m = gl.program_id(1) * 8 + gl.arange(0, 8, gl.SliceLayout(0, LAYOUT))
        o_sums = (m % TOKENS).expand_dims(0) * ROWS + n.expand_dims(1)
        y = gl.zeros([ROWS, 8], gl.float32, LAYOUT)
        for program in range(first, last + 1):
            place = (first_unit(program, programs, units, 1) <= start).to(gl.int32)
            shared = ((group * programs + program) * 2 + place).to(gl.int64)
            y += gl.load(p_sums + shared * (TOKENS * ROWS) + o_sums)
        write(y, row_block * ROWS + n, m, p_row_norms, p_bias, p_y, M, N, has_bias, DTYPE)
