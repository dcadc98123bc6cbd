# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no starred tuples)
"""The decode GEMM for up to 8 tokens: see :mod:`qamw_kernels.ops.gluon.look_up` for the look-ups.

What few tokens cost is waiting, so everything here is about beginning early and ending soon. One
program has a multiprocessor, and so one table and one copy of the activations. A warp has half a
tile: the same 256 inputs of all row tiles of its program, whose activations it keeps in its
registers. Nothing but index words is read in the loop, and those are fetched into L2 turns before.
What the warps have summed is added up once for many row tiles, so that they seldom wait for each
other.

These go together through the functions below:

- ``turn``: of the loop: (row tile, slice of the inputs, first row tile of the batch).
- ``weight``: (at its tiles, input tiles, slices, row tiles of a batch, end of the row tiles).
- ``place``: of a thread: (in a tile, at its token, warp, half of a tile, 4 * lane).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from qamw_kernels.ops.gluon.look_up import load_quadrant, multiply_chunk
from qamw_kernels.ops.gluon.prefetch import prefetch, prefetch_bytes, prefetch_rows

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
def next_turn(turn, weight):
    """The turn after this one."""
    row_tile, s, first = turn
    _, _, slices, batch, end = weight
    stop = gl.minimum(first + batch, end)
    row_tile += 1
    s = gl.where(row_tile == stop, s + 1, s)
    row_tile = gl.where((row_tile == stop) & (s < slices), first, row_tile)
    first = gl.where(s == slices, stop, first)
    s = gl.where(s == slices, 0, s)
    return row_tile, s, first


@gluon.jit
def prefetch_turn(turn, weight, INDEX_BITS: gl.constexpr, WARPS: gl.constexpr):
    """The tiles of a turn, if there is one; every other warp asks for one."""
    p_tiles, input_tiles, _, _, end = weight
    thread = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    tile = turn[1] * (WARPS // 2) + thread // 64
    m_thread = (thread % 64 == 0) & (turn[0] < end) & (tile < input_tiles)
    p_tile = p_tiles + (turn[0].to(gl.int64) * input_tiles + tile) * (INDEX_BITS * 128)
    prefetch(p_tile, m_thread, prefetch_bytes(INDEX_BITS * 512))


@gluon.jit
def load_words(turn, weight, place, INDEX_BITS: gl.constexpr, WARPS: gl.constexpr):
    """The words that 16 of the 32 pairs of every slot are in: entries, then signs.

    They are read once, and take no room in L1 (.cg). Tiles past the end are read as the last ones:
    the activations of those inputs are zeros, and such rows are not written.
    """
    ENTRY_BITS: gl.constexpr = INDEX_BITS - 2
    p_tiles, input_tiles, _, _, end = weight
    word, _, warp, half, _ = place
    row_tile = gl.minimum(turn[0], end - 1).to(gl.int64)
    tile = gl.minimum(turn[1] * (WARPS // 2) + warp // 2, input_tiles - 1)
    p_words = p_tiles + word + (row_tile * input_tiles + tile) * (INDEX_BITS * 128)
    p_half = p_words + half * (ENTRY_BITS // 2 * 128)
    words = ()
    for j in gl.static_range((ENTRY_BITS + 1) // 2):
        words = words + (gl.load(p_half + j * 128, cache_modifier=".cg"),)
    return words + (gl.load(p_words + (ENTRY_BITS + half) * 128, cache_modifier=".cg"),)


@gluon.jit
def half_tile(place, s, K, WARPS: gl.constexpr):
    """Where the activations of half a tile of a slice are, and how many chunks of them exist."""
    _, p_token, warp, _, _ = place
    first = (s * WARPS + warp) * CHUNKS
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
    """The activations x of half a tile of a slice, of which not all may exist."""
    _, chunks = half_tile(place, s, K, WARPS)
    kept = ()
    for chunk in gl.static_range(CHUNKS):
        kept = kept + (gl.where(chunk < chunks, x[chunk], 0),)
    return kept


@gluon.jit
def align(words, half, ENTRY_BITS: gl.constexpr):
    """Entry words from bit 0 on: with an odd number of bits the second half begins at bit 16."""
    aligned = words
    if ENTRY_BITS % 2:
        bytes_of_word = gl.where(half != 0, 0x5432, 0x3210)
        aligned = ()
        for j in gl.static_range(ENTRY_BITS // 2 + 1):
            next_word = words[min(j + 1, ENTRY_BITS // 2)]
            word = gl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, $3;",
                "=r,r,r,r",
                [words[j], next_word, bytes_of_word],
                dtype=gl.int32,
                is_pure=True,
                pack=1,
            )
            aligned = aligned + (word,)
    return aligned


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
    INDEX_BITS: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """acc + half a tile per warp times its activations.

    raw, x: words and activations of this turn.
    turn: the one after.
    s: the slice of this one.

    Returns acc, and words and activations of the turn after, which are loaded as soon as these are
    not needed any more.
    """
    ENTRY_BITS: gl.constexpr = INDEX_BITS - 2
    _, _, _, half, lane4 = place
    words = align(raw, half, ENTRY_BITS)
    signs = raw[(ENTRY_BITS + 1) // 2]
    p_half, chunks = half_tile(place, turn[1], K, WARPS)
    new_chunks = gl.where(turn[1] != s, chunks, 0)
    sums, renewed = (acc,), ()
    for chunk in gl.static_range(CHUNKS):
        if chunk == CHUNKS // 2:
            raw = load_words(turn, weight, place, INDEX_BITS, WARPS)
        sums = multiply_chunk(
            sums, table, words, signs, (x[chunk],), lane4, chunk, ENTRY_BITS, DTYPE, WARPS
        )
        m_chunk = chunk < new_chunks
        renewed = renewed + (gl.load(p_half + chunk * 16, mask=m_chunk, other=x[chunk]),)
    return sums[0], raw, renewed


@gluon.jit
def write_sums(
    slots,
    row_tiles,
    slices,
    first_row_tile,
    output,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """y of ``row_tiles`` row tiles: what all warps have in ``slices`` slots each.

    slots: [slot, warp, row, token], one after the other.
    output: the kernel's arguments of these names.
    """
    p_row_norms, p_bias, p_y, M, N, has_bias = output
    OUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    for first in range(0, row_tiles * 128, 32 * WARPS):
        e = first + gl.arange(0, 32 * WARPS, OUT)
        row_tile, row, m = e // 128, e // 8 % 16, e % 8
        n = (first_row_tile + row_tile) * 16 + row
        m_out = (row_tile < row_tiles) & (n < N) & (m < M)
        norm = gl.load(p_row_norms + n, mask=m_out, other=0.0)
        bias = gl.load(p_bias + n, mask=m_out & (has_bias != 0), other=0.0).to(gl.float32)
        at = gl.minimum(row_tile, row_tiles - 1) * (slices * WARPS * 128) + e % 128
        total = gl.zeros([32 * WARPS], gl.float32, OUT)
        for s in range(slices):
            for warp in gl.static_range(WARPS):
                total += slots.gather(at + (s * WARPS + warp) * 128, 0)
        o_y = m.to(gl.int64) * N + n
        gl.store(p_y + o_y, (total * norm + bias).to(DTYPE), mask=m_out)


@gluon.jit(
    do_not_specialize=["M", "N", "has_bias", "run", "batch"],
    do_not_specialize_on_alignment=["p_bias"],
)
def narrow_gemm_kernel(
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
    run,
    batch,
    INDEX_BITS: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
    WARP_BASES: gl.constexpr,
    SLOTS: gl.constexpr,
    AHEAD: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """y [M, N] = row_norms * (coordinates [N, K] @ x [M, K]^T)^T + bias, M <= 8.

    A program has the row tiles from program_id * R / num_programs on, of R. All inputs of a slice,
    256 for every warp, are multiplied with as many row tiles as there are slots for, before the
    next slice is.

    p_x: [M, K / 2] int32, two activations per word.
    SLOTS: row tiles x slices whose sums are kept until they are added up, K <= 256 * WARPS * SLOTS.
    AHEAD: turns that tiles are prefetched before they are decoded; 0: they are not.
    DEPENDENT: the program may run before the kernel is complete that writes x.
    """
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2]], [[4], [8], [16], [32], [64]], WARP_BASES, [], [WARPS * 128]
    )
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    SLOT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    table = gl.allocate_shared_memory(gl.int32, [32 << (INDEX_BITS - 2)], FLAT)
    slots = gl.allocate_shared_memory(gl.float32, [SLOTS, WARPS, 16, 8], SLOT)
    flat = reinterpret(slots, gl.float32, [SLOTS * WARPS * 128], FLAT)

    input_tiles = (K + 511) // 512
    slices = (input_tiles + WARPS // 2 - 1) // (WARPS // 2)
    begin = gl.program_id(0) * run
    end = gl.minimum(begin + run, (N + 15) // 16)
    weight = (p_tiles, input_tiles, slices, batch, end)
    turn = (begin, gl.to_tensor(0), begin)
    ahead = turn
    for _ in gl.static_range(AHEAD):
        prefetch_turn(ahead, weight, INDEX_BITS, WARPS)
        ahead = next_turn(ahead, weight)
    prefetch_rows(p_row_norms, begin * 16, gl.minimum(end * 16, N), WARPS)
    prefetch_rows(p_bias, begin * 16, gl.minimum(end * 16, N * has_bias), WARPS)
    table.store(load_quadrant(p_quadrant, INDEX_BITS - 2, DTYPE, WARPS))
    gl.barrier()
    if DEPENDENT:
        gdc_wait()

    index = gl.arange(0, WARPS * 128, WORDS)
    slot, lane, warp = index % 4, index // 4 % 32, index // 128
    p_token = p_x + gl.minimum(lane // 4, M - 1) * (K // 2) + lane % 4 * 4 + slot
    place = (lane * 4 + slot, p_token, warp, warp % 2, lane * 4)
    x = load_tokens(place, K, WARPS)
    raw = load_words(turn, weight, place, INDEX_BITS, WARPS)
    for first in range(begin, end, batch):
        stop = gl.minimum(first + batch, end)
        for s in range(slices):
            if slices > 1:
                x = zero_rest(x, place, s, K, WARPS)
            for row_tile in range(first, stop):
                if AHEAD:
                    prefetch_turn(ahead, weight, INDEX_BITS, WARPS)
                    ahead = next_turn(ahead, weight)
                turn = next_turn(turn, weight)
                acc = gl.zeros([WARPS, 16, 8], gl.float32, MMA)
                acc, raw, x = multiply_half(
                    acc, table, raw, x, turn, s, weight, place, K, INDEX_BITS, DTYPE, WARPS
                )
                slots.index((row_tile - first) * slices + s).store(acc)
        gl.barrier()
        output = (p_row_norms, p_bias, p_y, M, N, has_bias)
        write_sums(flat, stop - first, slices, first, output, DTYPE, WARPS)
        gl.barrier()
