# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no starred tuples)
"""The decode GEMM for up to 8 tokens: see :mod:`qamw_kernels.ops.gluon.look_up` for the look-ups.

With few tokens most of the time is waiting, so everything here aims at beginning early and ending
soon. A multiprocessor runs one program, with one table and one copy of the activations. A warp has
half a tile: the same 256 inputs of all row tiles of its program. It keeps their activations in
registers, so that the loop reads only index words, which are fetched into L2 one turn before. The
sums of the warps are added up once for many row tiles, so that warps seldom wait for each other.
Experts have fewer inputs: in :mod:`qamw_kernels.ops.gluon.routed_kernels` the warps multiply
several row tiles at once. The tuples that are passed to the functions below are explained in
:mod:`qamw_kernels.ops.gluon.turns`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from qamw_kernels.ops.gluon.look_up import (
    bank_of,
    is_trellis,
    load_entries,
    make_table,
    multiply_chunk,
    permute,
    sign_words,
)
from qamw_kernels.ops.gluon.prefetch import prefetch_rows
from qamw_kernels.ops.gluon.turns import (
    next_turn,
    prefetch_turn,
    seat_of,
    tile_of_seat,
    tiles_of_turn,
)

CHUNKS = gl.constexpr(8)  # of half a tile

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret(shared, dtype: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """The same shared memory in another shape."""
        return shared.reinterpret(dtype, SHAPE, LAYOUT)

else:  # Triton 3.8 and older

    @gluon.jit
    def reinterpret(shared, dtype: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """The same shared memory in another shape."""
        return shared._reinterpret(dtype, SHAPE, LAYOUT)


@gluon.jit
def load_words(turn, weight, place, RATE: gl.constexpr, WARPS: gl.constexpr):
    """The words that hold 16 of the 32 pairs of every slot: entries, then signs or the path.

    They are read once, so they bypass L1 (.cg).
    """
    ENTRY_BITS: gl.constexpr = RATE[1]
    word, _, sub, half, _ = place
    p_row_tile = tiles_of_turn(turn, weight, RATE[0])
    o_tile = word + tile_of_seat(turn, sub, half, weight, RATE[0], WARPS)
    # Offsets are added up in 32 bits first: pointers kept in registers would take two each.
    p_half = p_row_tile + (o_tile + (half & 1) * (ENTRY_BITS // 2 * 128))
    if is_trellis(RATE):
        p_signs = p_row_tile + (o_tile + ENTRY_BITS * 128)
    else:
        p_signs = p_row_tile + (o_tile + (ENTRY_BITS + (half & 1)) * 128)
    words = ()
    for j in gl.static_range((ENTRY_BITS + 1) // 2):
        words = words + (gl.load(p_half + j * 128, cache_modifier=".cg"),)
    return words + (gl.load(p_signs, cache_modifier=".cg"),)


@gluon.jit
def half_tile(place, s, K, WARPS: gl.constexpr):
    """Where the activations of half a tile of a slice are, and how many chunks of them exist."""
    _, p_token, _, half, _ = place
    first = (s * WARPS + half) * CHUNKS
    return p_token + first * 16, K // 32 - first


@gluon.jit
def load_tokens(place, K, WARPS: gl.constexpr):
    """The activations of half a tile of the first slice; zeros where there are no more inputs."""
    p_half, chunks = half_tile(place, 0, K, WARPS)
    x = ()
    for chunk in gl.static_range(CHUNKS):
        x = x + (gl.load(p_half + chunk * 16, mask=chunk < chunks, other=0),)
    return x


@gluon.jit
def zero_rest(x, place, s, K, WARPS: gl.constexpr):
    """The activations x of half a tile of a slice, with zeros for inputs that do not exist."""
    _, chunks = half_tile(place, s, K, WARPS)
    kept = ()
    for chunk in gl.static_range(CHUNKS):
        kept = kept + (gl.where(chunk < chunks, x[chunk], 0),)
    return kept


@gluon.jit
def align(words, half, ENTRY_BITS: gl.constexpr):
    """Entry words moved to bit 0: with odd ENTRY_BITS, those of the second half begin at bit 16."""
    aligned = words
    if ENTRY_BITS % 2:
        bytes_of_word = gl.where(half != 0, 0x5432, 0x3210)
        aligned = ()
        for j in gl.static_range(ENTRY_BITS // 2 + 1):
            next_word = words[min(j + 1, ENTRY_BITS // 2)]
            aligned = aligned + (permute(words[j], next_word, bytes_of_word),)
    return aligned


@gluon.jit
def signs_of_half(word, half, RATE: gl.constexpr):
    """Words with the signs of a half's 16 pairs, in the form of :func:`sign_words`."""
    if is_trellis(RATE):
        word >>= (half & 1) * 4  # a byte has the units of the second half above those of the first
    return sign_words((word,), 0, RATE)


@gluon.jit
def multiply_half(
    acc,
    table,
    raw,
    x,
    turn,
    s,
    weight,
    place,
    K,
    RATE: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """acc + half a tile per warp times its activations.

    raw, x: words and activations of this turn.
    turn: the next turn.
    s: the slice of this turn.

    Returns acc, and the words and activations of the next turn, which are loaded as soon as those
    of this turn are not needed any more.
    """
    _, _, _, half, bank = place
    words = align(raw, half & 1, RATE[1])
    signs = signs_of_half(raw[(RATE[1] + 1) // 2], half, RATE)
    p_half, chunks = half_tile(place, turn[1], K, WARPS)
    new_chunks = gl.where(turn[1] != s, chunks, 0)
    sums, renewed = (acc,), ()
    for chunk in gl.static_range(CHUNKS):
        if chunk == CHUNKS // 2:
            raw = load_words(turn, weight, place, RATE, WARPS)
        sums = multiply_chunk(
            sums, table, words, signs, (x[chunk],), bank, chunk, RATE, DTYPE, WARPS
        )
        m_chunk = chunk < new_chunks
        renewed = renewed + (gl.load(p_half + chunk * 16, mask=m_chunk, other=x[chunk]),)
    return sums[0], raw, renewed


@gluon.jit
def row_of_y(m, tokens):
    """The row of y that token ``m`` of a program has, and whether there is such a token."""
    p_slots, M = tokens
    if p_slots is None:
        row = m
    else:
        row = gl.load(p_slots + m)
    return row, row < M


@gluon.jit
def write_sums(
    slots,
    row_tiles,
    weight,
    first_row_tile,
    tokens,
    output,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Write y of ``row_tiles`` row tiles: what their warps have summed, in one slot for each slice.

    slots: [slot, warp, row, token], as one dimension.
    output: (p_row_norms, p_bias, p_y, N, has_bias) of the kernel.
    """
    p_row_norms, p_bias, p_y, N, has_bias = output
    _, _, slices, each, at_once, _, _ = weight
    OUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slots_of_slice = (row_tiles + at_once - 1) // at_once
    for first in range(0, row_tiles * 128, 32 * WARPS):
        e = first + gl.arange(0, 32 * WARPS, OUT)
        row_tile, row = e // 128, e // 8 % 16
        row_of_m, m_token = row_of_y(e % 8, tokens)
        n = (first_row_tile + row_tile) * 16 + row
        m_out = (row_tile < row_tiles) & (n < N) & m_token
        norm = gl.load(p_row_norms + n, mask=m_out, other=0.0)
        bias = gl.load(p_bias + n, mask=m_out & (has_bias != 0), other=0.0).to(gl.float32)
        row_tile = gl.minimum(row_tile, row_tiles - 1)
        at = (row_tile // at_once * WARPS + row_tile % at_once * each) * 128 + e % 128
        total = gl.zeros([32 * WARPS], gl.float32, OUT)
        for s in range(slices):
            for warp in range(each):
                total += slots.gather(at + (s * slots_of_slice * WARPS + warp) * 128, 0)
        o_y = row_of_m.to(gl.int64) * N + n
        gl.store(p_y + o_y, (total * norm + bias).to(DTYPE), mask=m_out)


@gluon.jit
def make_shared(SLOTS: gl.constexpr, RATE: gl.constexpr, WARPS: gl.constexpr):
    """Shared memory of the table and of the slots, and the slots again as one dimension."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    SLOT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    table = make_table(RATE)
    slots = gl.allocate_shared_memory(gl.float32, [SLOTS, WARPS, 16, 8], SLOT)
    return table, slots, reinterpret(slots, gl.float32, [SLOTS * WARPS * 128], FLAT)


@gluon.jit
def prefetch_run(
    begin,
    weight,
    p_row_norms,
    N,
    K,
    RATE: gl.constexpr,
    WARPS: gl.constexpr,
    PREFETCH: gl.constexpr,
):
    """Prefetch what the first turn reads, and the row norms of all turns."""
    if PREFETCH:
        prefetch_turn((begin, gl.to_tensor(0), begin), weight, K, RATE, WARPS)
    prefetch_rows(p_row_norms, begin * 16, gl.minimum(weight[6] * 16, N), WARPS)


@gluon.jit
def multiply_run(
    shared,
    begin,
    weight,
    p_x,
    tokens,
    slots_per_token,
    output,
    K,
    RATE: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
    WARP_BASES: gl.constexpr,
    PREFETCH: gl.constexpr,
):
    """Compute y of the row tiles from ``begin`` to the weight's end.

    tokens: (pointer to the rows of y that tokens have, or None if they are in order; number of
        rows).
    """
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2]], [[4], [8], [16], [32], [64]], WARP_BASES, [], [WARPS * 128]
    )
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    table, slots, flat = shared
    _, _, slices, _, at_once, batch, end = weight
    index = gl.arange(0, WARPS * 128, WORDS)
    slot, lane = index % 4, index // 4 % 32
    row_of_m, _ = row_of_y(lane // 4, tokens)
    token = (gl.minimum(row_of_m, tokens[1] - 1) // slots_per_token).to(gl.int64)
    p_token = p_x + token * (K // 2) + lane % 4 * 4 + slot
    sub, half = seat_of(index // 128, weight, WARPS)
    place = (lane * 4 + slot, p_token, sub, half, bank_of(lane, RATE))
    x = load_tokens(place, K, WARPS)
    turn = (begin, gl.to_tensor(0), begin)
    raw = load_words(turn, weight, place, RATE, WARPS)
    for first in range(begin, end, batch):
        stop = gl.minimum(first + batch, end)
        at = 0
        for s in range(slices):
            if slices > 1:
                x = zero_rest(x, place, s, K, WARPS)
            for _row_tile in range(first, stop, at_once):
                turn = next_turn(turn, weight)
                if PREFETCH:
                    # No further ahead: L2 would not keep what all programs have asked for.
                    prefetch_turn(turn, weight, K, RATE, WARPS)
                acc = gl.zeros([WARPS, 16, 8], gl.float32, MMA)
                acc, raw, x = multiply_half(
                    acc, table, raw, x, turn, s, weight, place, K, RATE, DTYPE, WARPS
                )
                slots.index(at).store(acc)
                at += 1
        gl.barrier()
        write_sums(flat, stop - first, weight, first, tokens, output, DTYPE, WARPS)
        gl.barrier()


@gluon.jit(
    do_not_specialize=["M", "N", "has_bias", "run", "batch"],
    do_not_specialize_on_alignment=["p_bias"],
)
def narrow_gemm_kernel(
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
    run,
    batch,
    INDEX_BITS: gl.constexpr,
    ENTRY_BITS: gl.constexpr,
    COPIES: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
    WARP_BASES: gl.constexpr,
    SLOTS: gl.constexpr,
    PREFETCH: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """y [M, N] = row_norms * (coordinates [N, K] @ x [M, K]^T)^T + bias, M <= 8.

    Program i has ``run`` row tiles, from i * run on. All inputs of a slice, 256 for every warp, are
    multiplied with as many row tiles as there are slots for, before those of the next slice are.

    p_x: [M, K / 2] int32, two activations per word.
    batch: row tiles whose sums fit into the slots.
    SLOTS: turns whose sums are kept until they are added up, K <= 256 * WARPS * SLOTS.
    PREFETCH: whether tiles are brought to L2 a turn before they are decoded.
    DEPENDENT: the program may begin before the kernel that writes x is complete.
    """
    RATE: gl.constexpr = (INDEX_BITS, ENTRY_BITS, COPIES)
    input_tiles = (K + 511) // 512
    slices = (input_tiles + WARPS // 2 - 1) // (WARPS // 2)
    begin = gl.program_id(0) * run
    end = gl.minimum(begin + run, (N + 15) // 16)
    weight = (p_tiles, input_tiles, slices, WARPS, 1, batch, end)
    prefetch_run(begin, weight, p_row_norms, N, K, RATE, WARPS, PREFETCH)
    prefetch_rows(p_bias, begin * 16, gl.minimum(end * 16, N * has_bias), WARPS)
    shared = make_shared(SLOTS, RATE, WARPS)
    shared[0].store(load_entries(p_entries, RATE, DTYPE, WARPS))
    gl.barrier()
    if DEPENDENT:
        gdc_wait()
    multiply_run(
        shared,
        begin,
        weight,
        p_x,
        (None, M),
        1,
        (p_row_norms, p_bias, p_y, N, has_bias),
        K,
        RATE,
        DTYPE,
        WARPS,
        WARP_BASES,
        PREFETCH,
    )
