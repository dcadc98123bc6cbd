# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no starred tuples)
"""The decode GEMM for up to 512 tokens on sm_90: decode once, multiply with many.

It needs a Triton with shared-memory gather, warpgroup products and tensor descriptors.

Words are decoded as in :mod:`qamw_kernels.ops.gluon.look_up`. Decoded words are registers of
wgmma's first operand, and the activations its second one, in shared memory: one copy for all warps,
brought there by the copy engine (:mod:`qamw_kernels.ops.gluon.ring`). The operand's k is 16 h + 8
k8 + 2 t + half where lane t holds inputs 8 t + 4 h + 2 k8 + half, so the activations come swapped:
position p of 32 holds the input whose bits 1, 2 are bits 3, 4 of p, and the other way round.

A row block has HALVES row tiles for every warp. From 64 tokens on, it is what L2 delivers that
counts, so the activations of a block serve as many rows as there are registers for sums. A unit is
one tile along the inputs of a row block. Units are in the order of memory, and every program takes
as many as the others, from wherever the one before it ends. A row block that several programs share
is added up by :mod:`qamw_kernels.ops.gluon.sums_kernels`, in the order of its inputs, so that a
result does not depend on who was first.

Both kernels may begin before the one that they depend on is complete (programmatic dependent
launch), and wait for it when they need what it wrote.

These go together through the functions below:

- ``place``: (input tiles, number of the row block, number of the tile along the inputs).
- ``weight``: (at its tiles, N).
- ``lookup``: (the table in shared memory, 4 * lane of every slot).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qamw_kernels.ops.gluon.look_up import entry_address, halves, load_quadrant, write
from qamw_kernels.ops.gluon.prefetch import prefetch, prefetch_bytes, prefetch_rows
from qamw_kernels.ops.gluon.ring import make_ring, start_copy, wait_for
from qamw_kernels.ops.gluon.sums_kernels import first_unit, store_sums


@gluon.jit
def anew(x):
    """x, int32. The compiler cannot know it before, and so keeps nothing that depends on it in
    registers throughout a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


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


@gluon.constexpr_function
def is_late(WORD, ENTRY_BITS):
    """Whether only the second half of a tile's inputs needs a word."""
    return WORD == ENTRY_BITS + 1 or 16 * ENTRY_BITS <= 32 * WORD < 32 * ENTRY_BITS


@gluon.jit
def no_words(like, INDEX_BITS: gl.constexpr):
    """A tile's words before anything is loaded."""
    words = ()
    for _ in gl.static_range(INDEX_BITS):
        words = words + (gl.zeros_like(like),)
    return words


@gluon.jit
def renew_words(words, p_words, m_tile, LATE: gl.constexpr):
    """``words``, the late ones of them or the others loaded from a tile, if ``m_tile``."""
    renewed = ()
    for j in gl.static_range(len(words)):
        if is_late(j, len(words) - 2) == LATE:
            word = gl.load(p_words + j * 128, mask=m_tile, other=0, cache_modifier=".cg")
            renewed = renewed + (word,)
        else:
            renewed = renewed + (words[j],)
    return renewed


@gluon.jit
def next_place(place):
    """That of the unit after this one."""
    input_tiles, row_block, tile = place
    ends = (tile + 1 == input_tiles).to(gl.int32)
    return input_tiles, row_block + ends, (tile + 1) * (1 - ends)


@gluon.jit
def tile_pointers(weight, place, warp, HALF: gl.constexpr, HALVES: gl.constexpr, shape):
    """At the tiles of a unit's half that warps have.

    Rows past the end are read again, and not written.

    shape: (INDEX_BITS, WARPS).
    """
    p_tiles, N = weight
    input_tiles, row_block, tile = place
    row_tile = (row_block * HALVES + HALF) * shape[1] + warp
    row_tile = gl.minimum(row_tile, (N + 15) // 16 - 1).to(gl.int64)
    return p_tiles + (row_tile * input_tiles + tile) * (shape[0] * 128)


@gluon.jit
def prefetch_unit(weight, place, wanted, HALVES: gl.constexpr, shape):
    """The tiles of a unit, if it is ``wanted``."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [shape[1]], [0])
    thread = anew(gl.arange(0, 32 * shape[1], LANES))
    for half in gl.static_range(HALVES):
        p_tile = tile_pointers(weight, place, thread // 32, half, HALVES, shape)
        prefetch(p_tile, (thread % 32 == 0) & wanted, prefetch_bytes(shape[0] * 512))


@gluon.constexpr_function
def frees_block(INPUT, BLOCK_INPUTS, HALF, HALVES):
    """Whether a block has been multiplied for the last time when this stage is issued."""
    return INPUT % BLOCK_INPUTS == 0 and (HALVES - 1 if INPUT else 0) == HALF


@gluon.jit
def multiply_half(
    acc,
    words,
    p_words,
    next_words,
    lookup,
    ring,
    copies,
    block,
    HALF: gl.constexpr,
    HALVES: gl.constexpr,
    STAGE_INPUTS: gl.constexpr,
):
    """acc + one tile per warp times its activations, which begin with block number ``block``.

    Words are loaded a quarter of a tile before they are needed, all at once: whoever waits for one
    waits for all. Returned are also those of the next tile, and what is left of ``copies``.

    words: of the tile at ``p_words``, those that are not late.
    next_words: at the next tile, and whether there is one.
    """
    table, lane4 = lookup
    _, places, _ = ring
    MMA: gl.constexpr = acc.type.layout
    PLACES: gl.constexpr = places.shape[0]
    BLOCK_INPUTS: gl.constexpr = places.shape[2]
    for s in gl.static_range(512 // STAGE_INPUTS):
        here = block + s * STAGE_INPUTS // BLOCK_INPUTS
        x = places.index(here & (PLACES - 1))
        x = x.slice(s * STAGE_INPUTS % BLOCK_INPUTS, STAGE_INPUTS, dim=1)
        if HALF == 0 and s * STAGE_INPUTS % BLOCK_INPUTS == 0:
            wait_for(ring, here)
        if s * STAGE_INPUTS == 128:
            words = renew_words(words, p_words, True, True)
        elif s * STAGE_INPUTS == 384:
            words = renew_words(words, next_words[0], next_words[1], False)
        a = decode_stage(table, words, lane4, s, STAGE_INPUTS, places.dtype, MMA)
        acc = warpgroup_mma(a, x.permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # all but this stage
        # Once all warps are here, the block before this one has been multiplied with all halves.
        if frees_block(s * STAGE_INPUTS, BLOCK_INPUTS, HALF, HALVES):
            gl.barrier()
            copies = start_copy(ring, here + PLACES - 1, copies)
    return acc, words, copies


@gluon.jit
def multiply_unit(
    sums, words, weight, place, more, lookup, ring, copies, block, shape, STAGE_INPUTS: gl.constexpr
):
    """sums + a unit, of every half; also the words of the unit after it, and ``copies``.

    more: whether there is one after it.
    """
    _, lane4 = lookup
    HALVES: gl.constexpr = len(sums)
    index = gl.arange(0, shape[1] * 128, lane4.type.layout)
    warp, word = gl.max_constancy(anew(index // 128), 128), index % 128
    p_words = tile_pointers(weight, place, warp, 0, HALVES, shape) + word
    added = ()
    for half in gl.static_range(HALVES):
        if half + 1 < HALVES:
            next_words = (tile_pointers(weight, place, warp, half + 1, HALVES, shape) + word, True)
        else:
            p_next = tile_pointers(weight, next_place(place), warp, 0, HALVES, shape)
            next_words = (p_next + word, more)
        acc, words, copies = multiply_half(
            sums[half],
            words,
            p_words,
            next_words,
            lookup,
            ring,
            copies,
            block,
            half,
            HALVES,
            STAGE_INPUTS,
        )
        added = added + (acc,)
        p_words = next_words[0]
    return added, words, copies


@gluon.jit
def no_sums(SHAPE: gl.constexpr, MMA: gl.constexpr, HALVES: gl.constexpr):
    """Zeros, for every half."""
    sums = ()
    for _ in gl.static_range(HALVES):
        sums = sums + (gl.zeros(SHAPE, gl.float32, MMA),)
    return sums


@gluon.jit
def complete(sums):
    """``sums``, once all products are in them."""
    completed = ()
    for half in gl.static_range(len(sums)):
        completed = completed + (warpgroup_mma_wait(0, deps=[sums[half]]),)
    return completed


@gluon.jit
def write_rows(sums, row_block, token, output, DTYPE: gl.constexpr):
    """y of a whole row block; ``output``: the kernel's arguments of these names."""
    p_row_norms, p_bias, p_y, M, N, has_bias = output
    ROWS: gl.constexpr = sums[0].shape[0]
    n = gl.arange(0, ROWS, gl.SliceLayout(1, sums[0].type.layout))
    m = gl.arange(0, sums[0].shape[1], gl.SliceLayout(0, sums[0].type.layout))
    for half in gl.static_range(len(sums)):
        first = (row_block * len(sums) + half) * ROWS
        write(
            sums[half],
            first + anew(n),
            token + anew(m),
            p_row_norms,
            p_bias,
            p_y,
            M,
            N,
            has_bias,
            DTYPE,
        )


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
    PLACES: gl.constexpr,
    STAGE_INPUTS: gl.constexpr,
    HALVES: gl.constexpr,
    WARPS: gl.constexpr,
    WARP_BASES: gl.constexpr,
):
    """y [M, N] = row_norms * (coordinates [N, K] @ x [M, K]^T)^T + bias.

    Program (i, j) has TOKENS tokens and the i-th share of the units; of row blocks that it
    shares with others, the sums go to p_sums.

    x_blocks: descriptor of x [M, K], swapped, for blocks [TOKENS, BLOCK_INPUTS]; zeros past
        its ends.
    p_sums: float32, see :mod:`qamw_kernels.ops.gluon.sums_kernels`.
    grain: a program's units are a multiple of it, 1 or all of a row block.
    PLACES: for blocks of activations, a power of 2; with two halves, room for 512 inputs.
    WARP_BASES: [[128], [256] ...], one for every bit of the warp.
    """
    ENTRY_BITS: gl.constexpr = INDEX_BITS - 2
    SHAPE: gl.constexpr = (INDEX_BITS, WARPS)
    ROWS: gl.constexpr = WARPS * HALVES * 16
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2]], [[4], [8], [16], [32], [64]], WARP_BASES, [], [WARPS * 128]
    )
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, TOKENS, 16]
    )
    BANKS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    table = gl.allocate_shared_memory(gl.int32, [32 << ENTRY_BITS], BANKS)
    ring = make_ring(x_blocks, PLACES, DTYPE)

    gdc_launch_dependents()
    input_tiles = (K + 511) // 512
    units = (N + ROWS - 1) // ROWS * input_tiles
    first = first_unit(gl.program_id(0), gl.num_programs(0), units, grain)
    last = first_unit(gl.program_id(0) + 1, gl.num_programs(0), units, grain)
    first_block = first // input_tiles
    weight = (p_tiles, N)
    place = (input_tiles, first_block, first - first_block * input_tiles)
    # Two units on their way to L2: that which is loaded next, and one more.
    prefetch_unit(weight, place, True, HALVES, SHAPE)
    prefetch_unit(weight, next_place(place), first + 1 < last, HALVES, SHAPE)
    end = (last + input_tiles - 1) // input_tiles
    prefetch_rows(p_row_norms, first_block * ROWS, gl.minimum(end * ROWS, N), WARPS)
    table.store(load_quadrant(p_quadrant, ENTRY_BITS, DTYPE, WARPS))
    slot = gl.arange(0, WARPS * 128, WORDS)
    p_tile = tile_pointers(weight, place, slot // 128, 0, HALVES, SHAPE)
    words = renew_words(no_words(slot, INDEX_BITS), p_tile + slot % 128, True, False)
    gl.barrier()
    gdc_wait()

    token = gl.program_id(1) * TOKENS
    BLOCKS: gl.constexpr = 512 // BLOCK_INPUTS  # of a unit
    copies = (token, (last - first) * BLOCKS, input_tiles, place[2] * 512)
    for i in gl.static_range(PLACES - 1):
        copies = start_copy(ring, i, copies)
    lookup = (table, slot // 4 % 32 * 4)
    output = (p_row_norms, p_bias, p_y, M, N, has_bias)
    for row_block in range(first_block, end):
        start = row_block * input_tiles
        begin, stop = gl.maximum(first, start), gl.minimum(last, start + input_tiles)
        sums = no_sums([WARPS * 16, TOKENS], MMA, HALVES)
        for unit in range(begin, stop):
            place = (input_tiles, row_block, anew(unit - start))
            ahead = next_place(next_place(place))
            prefetch_unit(weight, ahead, unit + 2 < last, HALVES, SHAPE)
            more, block = unit + 1 < last, anew((unit - first) * BLOCKS)
            sums, words, copies = multiply_unit(
                sums, words, weight, place, more, lookup, ring, copies, block, SHAPE, STAGE_INPUTS
            )
        sums = complete(sums)
        if stop - begin == input_tiles:
            write_rows(sums, row_block, token, output, DTYPE)
        else:
            # Of two row blocks that it may share, the one that it does not begin comes first.
            program = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
            which = (program * 2 + (begin == start).to(gl.int32)).to(gl.int64)
            store_sums(sums, p_sums + which * (TOKENS * ROWS))
