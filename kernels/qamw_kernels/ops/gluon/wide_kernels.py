# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no starred tuples)
"""The decode GEMM for up to 1024 tokens on sm_90: decode once, multiply with many.

It needs a Triton with shared-memory gather, warpgroup products and tensor descriptors.

Words are decoded as in :mod:`qamw_kernels.ops.gluon.look_up`. Decoded words are registers of
wgmma's first operand, and the activations its second one, in shared memory: one copy for all warps,
brought there by the copy engine (:mod:`qamw_kernels.ops.gluon.ring`). The operand's k is 16 h + 8
k8 + 2 t + half where lane t holds inputs 8 t + 4 h + 2 k8 + half, so the activations come swapped:
position p of 32 holds the input whose bits 1, 2 are bits 3, 4 of p, and the other way round.

A row block has a row tile for every warp. From 64 tokens on, the limits are the bandwidth of L2 and
the time of the products. So the activations of a block are used for as many rows as there are
registers for sums, and as many warps as possible decode meanwhile. A unit is one tile along the
inputs of a row block. Units are in the order of memory; all programs take equally many, and each
begins where the one before it ends. A row block that several programs share is added up by
:mod:`qamw_kernels.ops.gluon.sums_kernels`, in the order of its inputs, so that a result does not
depend on which program ends first.

Both kernels may begin before the one that they depend on is complete (programmatic dependent
launch), and wait for it when they need what it wrote.

These tuples are passed to the functions below:

- ``place``: (input tiles, number of the row block, number of the tile along the inputs).
- ``weight``: (pointer to the tiles of the first weight, row tiles before those of this one, N).
- ``lookup``: (the table in shared memory, the bank in it of every slot).
- ``SHAPE``: ((index bits, entry bits, copies of every entry), warps).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qamw_kernels.ops.gluon.look_up import (
    bank_of,
    entry_address,
    halves,
    is_trellis,
    load_entries,
    make_table,
    sign_shift,
    sign_word,
    sign_words,
    write,
)
from qamw_kernels.ops.gluon.prefetch import prefetch, prefetch_bytes, prefetch_rows
from qamw_kernels.ops.gluon.ring import make_ring, start_copy, wait_for
from qamw_kernels.ops.gluon.sums_kernels import first_unit, store_sums


@gluon.constexpr_function
def words_layout(WARPS):
    """Which of the words that a program loads at once a thread has: 4 in a row, 16 bytes."""
    bases = [[1 << i] for i in range((128 * WARPS).bit_length() - 1)]
    return gl.DistributedLinearLayout(bases[:2], bases[2:7], bases[7:], [], [128 * WARPS])


@gluon.constexpr_function
def sums_layout(WARPS, COLUMNS):
    """The layout of the sums of a warpgroup product: a warp has 16 rows."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16]
    )


@gluon.jit
def anew(x):
    """x, int32, moved so that the compiler does not know its value. So the compiler does not keep
    what depends on it in registers throughout a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def wait_for_all_but_one_stage(x):
    """Wait until a warpgroup's products of all stages but the last are complete; x is any int32.

    Triton's own wait is followed by a barrier of the whole program: with it no warpgroup would
    decode while another one multiplies.
    """
    gl.inline_asm_elementwise(
        "{ wgmma.wait_group.sync.aligned 1; mov.b32 $0, $1; }", "=r,r", [x], gl.int32, False, 1
    )


@gluon.jit
def flip_signs(words, signs):
    """words ^ (signs & 0x80008000).

    As inline assembly it is one instruction; the compiler would make two of it where it computes
    the signs ahead.
    """
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0x80008000, 0x78;", "=r,r,r", [words, signs], gl.int32, True, 1
    )


@gluon.jit
def decode_pair(lookup, words, signs, PAIR: gl.constexpr, RATE: gl.constexpr):
    """Codewords of pair PAIR of every slot."""
    table, bank = lookup
    codewords = table.gather(entry_address(words, bank, PAIR, RATE) >> 2, 0)
    return flip_signs(codewords, signs[sign_word(PAIR, RATE)] << sign_shift(PAIR, RATE))


@gluon.jit
def decode_stage(
    lookup,
    words,
    signs,
    STAGE: gl.constexpr,
    DTYPE: gl.constexpr,
    MMA: gl.constexpr,
    SHAPE: gl.constexpr,
):
    """Coordinates [16 * WARPS, 32] of a stage of a tile, as first operand: a slot has two pairs."""
    WARPS: gl.constexpr = SHAPE[1]
    low = decode_pair(lookup, words, signs, 2 * STAGE, SHAPE[0])
    high = decode_pair(lookup, words, signs, 2 * STAGE + 1, SHAPE[0])
    decoded = gl.join(low, high)
    a = halves(decoded, DTYPE).reshape([WARPS, 8, 4, 2, 2, 2, 2])  # ..., g, t, k8, r8, h, half
    a = a.permute([0, 4, 1, 5, 3, 2, 6]).reshape([WARPS * 16, 32])
    return gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.constexpr_function
def first_quarter(WORD, ENTRY_BITS):
    """The first quarter of a tile's inputs that needs a word; all need that of the path."""
    if WORD < ENTRY_BITS:
        return 32 * WORD // ENTRY_BITS // 8  # pairs of a quarter
    return 2 * (WORD - ENTRY_BITS)


@gluon.jit
def signs_of_stage(signs, words, STAGE: gl.constexpr, RATE: gl.constexpr):
    """The signs for a stage: the trellis has its signs made once per tile, in stage 0; those of the
    plain code are words of the tile, which are loaded meanwhile."""
    if STAGE == 0 or not is_trellis(RATE):
        signs = sign_words(words, RATE[1], RATE)
    return signs


@gluon.jit
def no_words(like, SHAPE: gl.constexpr):
    """A tile's words before anything is loaded."""
    words = ()
    for _ in gl.static_range(SHAPE[0][0]):
        words = words + (gl.zeros_like(like),)
    return words


@gluon.jit
def renew_words(words, p_words, m_tile, QUARTER: gl.constexpr, SHAPE: gl.constexpr):
    """``words``, with those that QUARTER is the first to need loaded from a tile, if ``m_tile``."""
    renewed = ()
    for j in gl.static_range(len(words)):
        if first_quarter(j, SHAPE[0][1]) == QUARTER:
            word = gl.load(p_words + j * 128, mask=m_tile, other=0, cache_modifier=".cg")
            renewed = renewed + (word,)
        else:
            renewed = renewed + (words[j],)
    return renewed


@gluon.jit
def next_place(place):
    """The place of the next unit."""
    input_tiles, row_block, tile = place
    ends = (tile + 1 == input_tiles).to(gl.int32)
    return input_tiles, row_block + ends, (tile + 1) * (1 - ends)


@gluon.jit
def tile_pointers(weight, place, warp, SHAPE: gl.constexpr):
    """Pointers to the tiles of a unit, one for each warp.

    Rows past the end are read again, and not written.
    """
    p_tiles, before, N = weight
    input_tiles, row_block, tile = place
    row_tile = before + gl.minimum(row_block * SHAPE[1] + warp, (N + 15) // 16 - 1).to(gl.int64)
    return p_tiles + (row_tile * input_tiles + tile) * (SHAPE[0][0] * 128)


@gluon.jit
def word_pointers(weight, place, warp, word, SHAPE: gl.constexpr):
    """Pointers to a thread's words of a unit, with what compilers cannot see: 16 bytes in a row."""
    p_words = tile_pointers(weight, place, warp, SHAPE) + word
    return gl.max_contiguous(gl.multiple_of(p_words, 16), 4)


@gluon.jit
def prefetch_unit(weight, place, wanted, SHAPE: gl.constexpr):
    """Prefetch the tiles of a unit, if it is ``wanted``."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [SHAPE[1]], [0])
    thread = anew(gl.arange(0, 32 * SHAPE[1], LANES))
    p_tile = tile_pointers(weight, place, thread // 32, SHAPE)
    prefetch(p_tile, (thread % 32 == 0) & wanted, prefetch_bytes(SHAPE[0][0] * 512))


@gluon.jit
def words_ahead(
    words, p_words, following, more, warp, word, STAGE: gl.constexpr, SHAPE: gl.constexpr
):
    """``words``, with those that a stage loads: a quarter of a tile before they are needed.

    The words of a quarter are loaded at once, because waiting for one is waiting for all. The last
    loads are those of the next tile, if there is ``more``.
    """
    if STAGE == 12:
        p_next = word_pointers(following[0], following[1], warp, word, SHAPE)
        words = renew_words(words, p_next, more, 0, SHAPE)
    elif STAGE % 4 == 0:
        words = renew_words(words, p_words, True, STAGE // 4 + 1, SHAPE)
    return words


@gluon.jit
def multiply_unit(
    acc, words, here, following, more, lookup, ring, copies, unit, SHAPE: gl.constexpr
):
    """acc + a tile per warp times its activations.

    Returns acc, the words of the next tile's first quarter, and what is left of ``copies``.

    words: of the tile; only those of its first quarter are loaded yet.
    here, following: (weight, place) of this unit and of the one after it.
    more: whether there is a unit after it.
    unit: its number among those of the program.
    """
    _, places, _ = ring
    MMA: gl.constexpr = acc.type.tensor_type.layout
    PLACES: gl.constexpr = places.shape[0]
    STAGES: gl.constexpr = places.shape[2] // 32  # of a block
    ROUNDS: gl.constexpr = 16 // STAGES // PLACES  # of the ring, for a tile
    index = gl.arange(0, SHAPE[1] * 128, lookup[1].type.layout)
    warp, word = anew(index // 128), index % 128
    p_words = word_pointers(here[0], here[1], warp, word, SHAPE)
    signs = ()
    for stage in gl.static_range(16):
        if stage % STAGES == 0:
            wait_for(ring, stage // STAGES % PLACES, unit * ROUNDS + stage // STAGES // PLACES)
            # anew(): or older compilers keep the addresses for all stages in registers, or spill.
            block = places.index(anew(gl.to_tensor(stage // STAGES % PLACES)))
        words = words_ahead(words, p_words, following, more, warp, word, stage, SHAPE)
        signs = signs_of_stage(signs, words, stage, SHAPE[0])
        a = decode_stage(lookup, words, signs, stage, places.dtype, MMA, SHAPE)
        x = block.slice(stage % STAGES * 32, 32, dim=1)
        acc = warpgroup_mma(a, x.permute([1, 0]), acc, is_async=True)
        wait_for_all_but_one_stage(unit)
        if stage % STAGES == 0:
            gl.barrier()  # the block before this one has been multiplied by all warps
            copies = start_copy(ring, (stage // STAGES + PLACES - 1) % PLACES, copies)
    return acc, words, copies


@gluon.jit
def write_rows(acc, row_block, token, output, DTYPE: gl.constexpr):
    """Write y of a whole row block; ``output``: (p_row_norms, p_bias, p_y, M, N, has_bias)."""
    p_row_norms, p_bias, p_y, M, N, has_bias = output
    ROWS: gl.constexpr = acc.shape[0]
    n = row_block * ROWS + anew(gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout)))
    m = token + anew(gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout)))
    write(acc, n, m, p_row_norms, p_bias, p_y, M, N, has_bias, DTYPE)


@gluon.jit(
    do_not_specialize=["M", "N", "has_bias", "grain"], do_not_specialize_on_alignment=["p_bias"]
)
def wide_gemm_kernel(
    p_tiles,
    x_blocks,
    p_row_norms,
    p_entries,
    p_bias,
    p_y,
    p_sums,
    M,
    N,
    K,
    has_bias,
    grain,
    INDEX_BITS: gl.constexpr,
    ENTRY_BITS: gl.constexpr,
    COPIES: gl.constexpr,
    DTYPE: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCK_INPUTS: gl.constexpr,
    PLACES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """y [M, N] = row_norms * (coordinates [N, K] @ x [M, K]^T)^T + bias.

    Program (i, j) has TOKENS tokens and the i-th share of the units; of row blocks that it
    shares with others, the sums go to p_sums.

    x_blocks: descriptor of x [M, K], swapped, for blocks [TOKENS, BLOCK_INPUTS]; zeros past
        its ends.
    p_sums: float32, see :mod:`qamw_kernels.ops.gluon.sums_kernels`.
    grain: a program's units are a multiple of it, 1 or all of a row block.
    PLACES: number of places for blocks of activations; it divides the number of blocks of a tile.
    """
    SHAPE: gl.constexpr = ((INDEX_BITS, ENTRY_BITS, COPIES), WARPS)
    ROWS: gl.constexpr = WARPS * 16
    MMA: gl.constexpr = sums_layout(WARPS, TOKENS)
    table = make_table(SHAPE[0])
    ring = make_ring(x_blocks, PLACES, DTYPE)

    gdc_launch_dependents()
    input_tiles = (K + 511) // 512
    units = (N + ROWS - 1) // ROWS * input_tiles
    first = first_unit(gl.program_id(0), gl.num_programs(0), units, grain)
    last = first_unit(gl.program_id(0) + 1, gl.num_programs(0), units, grain)
    first_block = first // input_tiles
    weight = (p_tiles, 0, N)
    place = (input_tiles, first_block, first - first_block * input_tiles)
    prefetch_unit(weight, place, True, SHAPE)
    end = (last + input_tiles - 1) // input_tiles
    prefetch_rows(p_row_norms, first_block * ROWS, gl.minimum(end * ROWS, N), WARPS)
    table.store(load_entries(p_entries, SHAPE[0], DTYPE, WARPS))
    slot = gl.arange(0, WARPS * 128, words_layout(WARPS))
    p_tile = tile_pointers(weight, place, slot // 128, SHAPE)
    words = renew_words(no_words(slot, SHAPE), p_tile + slot % 128, True, 0, SHAPE)
    gl.barrier()
    gdc_wait()

    token = gl.program_id(1) * TOKENS
    copies = ((token,), (last - first) * (512 // BLOCK_INPUTS), input_tiles, place[2] * 512)
    for i in gl.static_range(PLACES - 1):
        copies = start_copy(ring, i, copies)
    lookup = (table, bank_of(slot // 4 % 32, SHAPE[0]))
    output = (p_row_norms, p_bias, p_y, M, N, has_bias)
    for row_block in range(first_block, end):
        start = row_block * input_tiles
        begin, stop = gl.maximum(first, start), gl.minimum(last, start + input_tiles)
        acc = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, MMA))
        for unit in range(begin, stop):
            place = (input_tiles, row_block, anew(unit - start))
            more, number = unit + 1 < last, anew(unit - first)
            following = (weight, next_place(place))
            # No further ahead: L2 would not keep what all programs together have asked for.
            prefetch_unit(weight, following[1], more, SHAPE)
            acc, words, copies = multiply_unit(
                acc, words, (weight, place), following, more, lookup, ring, copies, number, SHAPE
            )
        acc = warpgroup_mma_wait(0, deps=[acc])
        if stop - begin == input_tiles:
            write_rows(acc, row_block, token, output, DTYPE)
        else:
            # Of two row blocks that it may share, the one that it does not begin comes first.
            program = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
            which = (program * 2 + (begin == start).to(gl.int32)).to(gl.int64)
            store_sums(acc, p_sums + which * (TOKENS * ROWS))
