# mypy: ignore-errors
"""Adding up the row blocks that programs of the wide kernel share, in the order of their inputs.

A program has at most two row blocks that it shares with others, at its beginning and at its end.
Its sums of them are stored in the order in which its threads hold them, so that both kernels move
16 bytes at once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from qamw_kernels.ops.gluon.look_up import write


@gluon.jit
def first_unit(program, programs, units, grain):
    """The first unit of a program: a multiple of ``grain``, which divides ``units``."""
    return program * (units // grain) // programs * grain


@gluon.jit
def store_sums(acc, p_shared):
    """Store a program's sums of a row block that it shares, as its threads hold them.

    p_shared: room for [token / 8, warp, lane, 4] float32: the sums of lane 4 g + t are of rows g
    and g + 8, each with tokens 2 t and 2 t + 1.
    """
    WARPS: gl.constexpr = acc.shape[0] // 16
    TOKENS: gl.constexpr = acc.shape[1]
    values = acc.reshape([WARPS, 2, 8, TOKENS // 8, 4, 2])
    values = values.permute([3, 0, 2, 4, 1, 5]).reshape([TOKENS * WARPS * 16])
    gl.store(p_shared + gl.arange(0, TOKENS * WARPS * 16, values.type.layout), values)


@gluon.jit(
    do_not_specialize=["M", "N", "has_bias", "programs", "TOKENS", "WARPS"],
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
    WARPS,
    DTYPE: gl.constexpr,
    ROWS: gl.constexpr,
):
    """y of the row blocks that programs of :func:`wide_gemm_kernel` have shared.

    Program (i, j) has ROWS rows from ROWS * i on, and 16 tokens from 16 j on. Each warp loads the
    part of a different program: so the long latencies of these loads overlap.

    p_sums: [token groups, programs, 2, TOKENS / 8, warp, 128] float32, see
        :func:`store_sums`. Of the two places of a program, the second is for a row block that it
        starts, the first for one that it does not start.
    """
    WARPS_OF_THIS: gl.constexpr = gl.num_warps()
    PARTS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS_OF_THIS, 1], [1, 0])
    SUMS: gl.constexpr = gl.BlockedLayout([WARPS_OF_THIS, 2], [1, 32], [1, WARPS_OF_THIS], [1, 0])
    ROWS_FIRST: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, WARPS_OF_THIS], [0, 1])
    OCTET: gl.constexpr = ROWS * 8  # sums of 8 tokens
    gdc_wait()
    first_row, first_token = gl.program_id(0) * ROWS, gl.program_id(1) * 16
    block_rows = WARPS * 16
    input_tiles = (K + 511) // 512
    units = (N + block_rows - 1) // block_rows * input_tiles
    start = first_row // block_rows * input_tiles
    first = ((start + 1) * programs - 1) // units
    last = ((start + input_tiles) * programs - 1) // units
    if first < last:
        index = gl.arange(0, 2 * OCTET, gl.SliceLayout(0, PARTS))
        octet = first_token % TOKENS // 8 + index // OCTET
        p_part = p_sums + (octet * WARPS + first_row // 16 % WARPS) * 128 + index % OCTET
        p_part += (first_token // TOKENS * programs * 2).to(gl.int64) * (TOKENS * block_rows)
        part = gl.arange(0, WARPS_OF_THIS, gl.SliceLayout(1, PARTS))
        total = gl.zeros([2 * OCTET], gl.float32, gl.SliceLayout(0, SUMS))
        for program in range(first, last + 1, WARPS_OF_THIS):
            # The program that begins the row block has it last, the others have it first.
            which = ((program + part) * 2 + (program + part == first).to(gl.int32)).to(gl.int64)
            p_parts = p_part.expand_dims(0) + (which * (TOKENS * block_rows)).expand_dims(1)
            m_parts = (program + part <= last).expand_dims(1)
            parts = gl.load(p_parts, mask=m_parts, other=0.0)
            total += gl.sum(gl.convert_layout(parts, SUMS), 0)  # a thread has all parts of a sum
        y = total.reshape([2, ROWS // 16, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5])
        y = gl.convert_layout(y.reshape([ROWS, 16]), ROWS_FIRST)
        n = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, ROWS_FIRST))
        m = first_token + gl.arange(0, 16, gl.SliceLayout(0, ROWS_FIRST))
        write(y, n, m, p_row_norms, p_bias, p_y, M, N, has_bias, DTYPE)
