# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no starred tuples)
"""The decode GEMM for what neither the narrow nor the wide kernel takes.

That is more than 8 tokens on GPUs other than Hopper. See :mod:`qamw_kernels.ops.gluon.look_up`.

The warps of a program are divided among some row tiles. The warps of one row tile take its tiles
along the inputs in turn, as a batched product, and their sums are added at the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qamw_kernels.ops.gluon.look_up import (
    bank_of,
    load_entries,
    load_words,
    make_table,
    multiply_chunk,
    sign_words,
    write,
)


@gluon.jit
def multiply_tile(
    acc,
    table,
    words,
    p_x,
    chunks,
    bank,
    RATE: gl.constexpr,
    WHOLE: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """acc + one tile per warp times its activations.

    Unless WHOLE, only the first ``chunks`` chunks exist.
    """
    signs = sign_words(words, RATE[1], RATE)
    for chunk in gl.static_range(16):
        x = ()
        for part in gl.static_range(len(acc)):
            if WHOLE:
                x = x + (gl.load(p_x[part] + chunk * 16),)
            else:
                x = x + (gl.load(p_x[part] + chunk * 16, mask=chunks > chunk, other=0),)
        acc = multiply_chunk(acc, table, words, signs, x, bank, chunk, RATE, DTYPE, WARPS)
    return acc


@gluon.jit
def advance(pointers, step):
    """A tuple of pointers, each moved by ``step`` elements."""
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
    p_entries,
    p_bias,
    p_y,
    M,
    N,
    K,
    has_bias,
    log_row_tiles,
    INDEX_BITS: gl.constexpr,
    ENTRY_BITS: gl.constexpr,
    COPIES: gl.constexpr,
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
    RATE: gl.constexpr = (INDEX_BITS, ENTRY_BITS, COPIES)
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2]], [[4], [8], [16], [32], [64]], WARP_BASES, [], [WARPS * 128]
    )
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    table = make_table(RATE)
    table.store(load_entries(p_entries, RATE, DTYPE, WARPS))
    gl.barrier()

    index = gl.arange(0, WARPS * 128, WORDS)
    slot, lane, warp = index % 4, index // 4 % 32, index // 128
    bank = bank_of(lane, RATE)
    log_share = len(WARP_BASES) - log_row_tiles
    share = 1 << log_share  # number of warps for one row tile
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
            acc = multiply_tile(acc, table, words, p_part, 0, bank, RATE, True, DTYPE, WARPS)
            p_words += share * INDEX_BITS * 128
            p_part = advance(p_part, share * 256)
        for tile in range(whole, input_tiles, share):
            # Not every warp has such a tile, and it may not be whole.
            m_tile = tile + first_tile < input_tiles
            words = load_words(p_words, m_tile, INDEX_BITS, False)
            chunks = K // 32 - (tile + first_tile) * 16
            acc = multiply_tile(acc, table, words, p_part, chunks, bank, RATE, False, DTYPE, WARPS)
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
