# mypy: ignore-errors
"""The wide kernel for mixtures of experts: see :mod:`qamw_kernels.ops.gluon.wide_kernels`.

The work is a list of runs: for every block of tokens, the row blocks of its expert, in the order of
the blocks (see :mod:`qamw_kernels.ops.routing`). Only the device knows how long the list is, so a
fixed number of programs divide it evenly. A run is a whole row block, so that nothing is left to
add up. A program that continues with the next block of tokens keeps its table, and changes the
expert.

The activations are sorted as the slots are, by the kernel that rotates them: the copy engine brings
blocks of tokens that lie side by side.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_init, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qamw_kernels.ops.gluon.look_up import bank_of, load_entries, make_table, write
from qamw_kernels.ops.gluon.ring import make_ring, start_copy
from qamw_kernels.ops.gluon.wide_kernels import (
    anew,
    multiply_unit,
    no_words,
    prefetch_unit,
    renew_words,
    sums_layout,
    tile_pointers,
    words_layout,
)

COLUMNS_AT_ONCE = gl.constexpr(16)  # of sums to write: their slots take registers


@gluon.jit
def runs_of_program(runs):
    """The first of a program's runs, and how many it has."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    first = runs // programs * program + gl.minimum(program, runs % programs)
    return first, runs // programs + (program < runs % programs).to(gl.int32)


@gluon.jit
def next_run(run, row_blocks):
    """The run after this one: (block of tokens, row block)."""
    block, row_block = run
    ends = row_block + 1 == row_blocks
    return block + ends.to(gl.int32), gl.where(ends, 0, row_block + 1)


@gluon.jit
def weight_of(p_tiles, p_experts, block, N):
    """The weight of a block's expert.

    For an expert of another rank the first one is read, and nothing is written.
    """
    expert = gl.maximum(gl.load(p_experts + block), 0)
    return p_tiles, expert * ((N + 15) // 16), N


@gluon.jit
def unit_after(unit, following):
    """The unit after this one, (weight, place), and whether it is the first of another run.

    following: (weight, row block) of the run after this one.
    """
    p_tiles, before, N = unit[0]
    input_tiles, row_block, tile = unit[1]
    ends = tile + 1 == input_tiles
    before = gl.where(ends, following[0][1], before)
    row_block = gl.where(ends, following[1], row_block)
    return ((p_tiles, before, N), (input_tiles, row_block, gl.where(ends, 0, tile + 1))), ends


@gluon.jit
def write_slots(acc, row_block, p_slots, num_slots, p_row_norms, p_y, N, DTYPE: gl.constexpr):
    """Write y of a row block and a block of slots, COLUMNS_AT_ONCE slots at a time."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    if COLUMNS > COLUMNS_AT_ONCE:
        low, high = gl.split(acc.reshape([ROWS, 2, COLUMNS // 2]).permute([0, 2, 1]))
        write_slots(low, row_block, p_slots, num_slots, p_row_norms, p_y, N, DTYPE)
        p_slots += COLUMNS // 2
        write_slots(high, row_block, p_slots, num_slots, p_row_norms, p_y, N, DTYPE)
    else:
        n = row_block * ROWS + anew(gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout)))
        slot = gl.load(p_slots + anew(gl.arange(0, COLUMNS, gl.SliceLayout(0, acc.type.layout))))
        # y may have more elements than 32 bits can count.
        write(acc, n, slot.to(gl.int64), p_row_norms, p_y, p_y, num_slots, N, 0, DTYPE)


@gluon.jit(do_not_specialize=["num_slots", "N"])
def routed_wide_gemm_kernel(
    p_tiles,
    x_blocks,
    p_row_norms,
    p_entries,
    p_slots,
    p_experts,
    p_num_sorted,
    p_y,
    num_slots,
    N,
    K,
    INDEX_BITS: gl.constexpr,
    ENTRY_BITS: gl.constexpr,
    COPIES: gl.constexpr,
    DTYPE: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCK_INPUTS: gl.constexpr,
    PLACES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """y [slots, N]: the row of a slot is its token times its expert's weight.

    Blocks have TOKENS slots. See :func:`qamw_kernels.ops.gluon.wide_kernels.wide_gemm_kernel` for
    compile-time arguments, and :func:`qamw_kernels.ops.triton.kernels.routed_gemm_kernel` for
    others. Everything but x was written before the kernel that writes x began.

    x_blocks: descriptor of x [sorted slots, K], swapped, for blocks [TOKENS, BLOCK_INPUTS]; the
        products of its padding are not written.
    """
    SHAPE: gl.constexpr = ((INDEX_BITS, ENTRY_BITS, COPIES), WARPS)
    ROWS: gl.constexpr = WARPS * 16
    MMA: gl.constexpr = sums_layout(WARPS, TOKENS)
    gdc_launch_dependents()
    input_tiles, row_blocks = (K + 511) // 512, (N + ROWS - 1) // ROWS
    first, left = runs_of_program(gl.load(p_num_sorted) // TOKENS * row_blocks)
    if left == 0:
        gdc_wait()  # or the next kernel could begin while x is still written
        return
    run = (first // row_blocks, first % row_blocks)
    weight = weight_of(p_tiles, p_experts, run[0], N)
    place = (input_tiles, run[1], 0)
    prefetch_unit(weight, place, True, SHAPE)
    table = make_table(SHAPE[0])
    ring = make_ring(x_blocks, PLACES, DTYPE)
    table.store(load_entries(p_entries, SHAPE[0], DTYPE, WARPS))
    slot = gl.arange(0, WARPS * 128, words_layout(WARPS))
    p_tile = tile_pointers(weight, place, slot // 128, SHAPE)
    words = renew_words(no_words(slot, SHAPE), p_tile + slot % 128, True, 0, SHAPE)
    gl.barrier()
    gdc_wait()

    tokens = (run[0] * TOKENS, row_blocks - run[1], row_blocks)
    copies = (tokens, left * input_tiles * (512 // BLOCK_INPUTS), input_tiles, 0)
    for i in gl.static_range(PLACES - 1):
        copies = start_copy(ring, i, copies)
    lookup = (table, bank_of(slot // 4 % 32, SHAPE[0]))
    unit = gl.to_tensor(0)
    while left > 0:
        following = next_run(run, row_blocks)
        last = left == 1  # none is following
        after = weight_of(p_tiles, p_experts, gl.where(last, run[0], following[0]), N)
        acc = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, MMA))
        for tile in range(input_tiles):
            tile = anew(tile)
            here = (weight, (input_tiles, run[1], tile))
            there, ends = unit_after(here, (after, following[1]))
            more = (ends & last) == 0
            prefetch_unit(there[0], there[1], more, SHAPE)
            acc, words, copies = multiply_unit(
                acc, words, here, there, more, lookup, ring, copies, unit, SHAPE
            )
            unit += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        expert = gl.load(p_experts + run[0])
        p_norms = p_row_norms + gl.maximum(expert, 0).to(gl.int64) * N
        some = gl.where(expert < 0, 0, num_slots)
        write_slots(acc, run[1], p_slots + run[0] * TOKENS, some, p_norms, p_y, N, DTYPE)
        run, weight, left = following, after, left - 1
