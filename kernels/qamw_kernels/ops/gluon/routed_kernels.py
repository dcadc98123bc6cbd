# mypy: ignore-errors
"""The narrow kernel for mixtures of experts: see :mod:`qamw_kernels.ops.gluon.narrow_kernels`.

The work is a list of runs of row tiles, one for every block of tokens, in the order of the blocks
(see :mod:`qamw_kernels.ops.routing`). Only the device knows how long the list is, so a fixed number
of programs divide it evenly. A program that continues with the next block keeps its table, and
changes the expert's weight and the tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from qamw_kernels.ops.gluon.look_up import load_entries
from qamw_kernels.ops.gluon.narrow_kernels import make_shared, multiply_run, prefetch_run


@gluon.jit
def share_of_program(blocks, turns):
    """The turns of a program: the first, and the end; a block has ``turns``.

    Every program works on one block only, with equally many programs for each block, if that takes
    at most one turn more than dividing all turns evenly: going on to another block takes longer
    than a turn.
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    even = (blocks * turns + programs - 1) // programs
    each = gl.maximum(programs // gl.maximum(blocks, 1), 1)  # programs of a block
    own = (turns + each - 1) // each
    first = program // each * turns + program % each * own
    stop = gl.minimum(program % each * own + own, turns) + program // each * turns
    alone = (blocks <= programs) & (own <= even + 1)
    begin = gl.minimum(gl.where(alone, first, program * even), blocks * turns)
    return begin, gl.minimum(gl.where(alone, stop, program * even + even), blocks * turns)


@gluon.jit
def run_of_block(block, share, turns, at_once, experts):
    """The row tiles that a program has of a block (first, end), and its expert's tiles and norms.

    There are no row tiles for an expert of another rank.

    experts: (pointers to the tiles of all experts, to their row norms and to the expert of every
        block; rows, row tiles and words of one expert).
    """
    begin, end = share
    p_tiles, p_row_norms, p_experts, N, row_tiles, size = experts
    expert = gl.load(p_experts + block)
    first = gl.maximum(begin - block * turns, 0) * at_once
    last = gl.minimum((end - block * turns) * at_once, row_tiles)
    last = gl.where(expert < 0, first, last)
    expert = gl.maximum(expert, 0).to(gl.int64)
    return first, last, p_tiles + expert * size, p_row_norms + expert * N


@gluon.jit(do_not_specialize=["num_slots", "slots_per_token", "N", "at_once", "batch"])
def routed_narrow_gemm_kernel(
    p_x,
    p_tiles,
    p_row_norms,
    p_entries,
    p_slots,
    p_experts,
    p_num_sorted,
    p_y,
    num_slots,
    slots_per_token,
    N,
    K,
    at_once,
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
    """y [slots, N]: row s is token s // slots_per_token times its expert's weight.

    Blocks have 8 slots. ``at_once`` row tiles are multiplied at once, each by as many warps as its
    inputs have half tiles, and ``batch`` of them before sums are added up. See
    :func:`qamw_kernels.ops.gluon.narrow_kernels.narrow_gemm_kernel` for compile-time arguments, and
    :func:`qamw_kernels.ops.triton.kernels.routed_gemm_kernel` for the others.
    Everything but x was written before the kernel that writes x began.
    """
    RATE: gl.constexpr = (INDEX_BITS, ENTRY_BITS, COPIES)
    entries = load_entries(p_entries, RATE, DTYPE, WARPS)  # while routing is read
    row_tiles, input_tiles = (N + 15) // 16, (K + 511) // 512
    each = gl.minimum((K + 255) // 256, WARPS)
    slices = (input_tiles + WARPS // 2 - 1) // (WARPS // 2)
    words = row_tiles.to(gl.int64) * input_tiles * (INDEX_BITS * 128)
    experts = (p_tiles, p_row_norms, p_experts, N, row_tiles, words)
    turns = (row_tiles + at_once - 1) // at_once
    share = share_of_program(gl.load(p_num_sorted) // 8, turns)
    begin, end = share
    if begin >= end:
        if DEPENDENT:  # or the next kernel could begin while x is still being written
            gdc_wait()
        return
    first, last, p_expert, p_norms = run_of_block(begin // turns, share, turns, at_once, experts)
    weight = (p_expert, input_tiles, slices, each, at_once, batch, last)
    prefetch_run(first, weight, p_norms, N, K, RATE, WARPS, PREFETCH)
    shared = make_shared(SLOTS, RATE, WARPS)
    shared[0].store(entries)
    gl.barrier()
    if DEPENDENT:
        gdc_wait()
    for block in range(begin // turns, (end + turns - 1) // turns):
        if first < last:
            multiply_run(
                shared,
                first,
                (p_expert, input_tiles, slices, each, at_once, batch, last),
                p_x,
                (p_slots + block * 8, num_slots),
                slots_per_token,
                (p_norms, p_y, p_y, N, 0),  # no bias
                K,
                RATE,
                DTYPE,
                WARPS,
                WARP_BASES,
                PREFETCH,
            )
        if (block + 1) * turns < end:
            first, last, p_expert, p_norms = run_of_block(block + 1, share, turns, at_once, experts)
            weight = (p_expert, input_tiles, slices, each, at_once, batch, last)
            prefetch_run(first, weight, p_norms, N, K, RATE, WARPS, PREFETCH)
