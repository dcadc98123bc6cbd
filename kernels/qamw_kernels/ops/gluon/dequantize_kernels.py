# mypy: ignore-errors
"""Decoding a weight into a matrix on sm_90, for the vendor's GEMM to multiply.

Words are decoded as in :mod:`qamw_kernels.ops.gluon.wide_kernels`; the Hadamard matrix takes the
place of the activations. It is symmetric, and stays a Hadamard matrix if its inputs and its outputs
are both permuted as the inputs are there. Then the accumulators of a lane are 8 outputs in a row,
and are stored as they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qamw_kernels.ops.gluon.look_up import bank_of, load_entries, make_table
from qamw_kernels.ops.gluon.sums_kernels import first_unit
from qamw_kernels.ops.gluon.wide_kernels import (
    anew,
    decode_stage,
    next_place,
    no_words,
    prefetch_unit,
    renew_words,
    signs_of_stage,
    sums_layout,
    tile_pointers,
    wait_for_all_but_one_stage,
    word_pointers,
    words_ahead,
    words_layout,
)


@gluon.jit
def swapped(k):
    """Inputs with bits 1, 2 and bits 3, 4 of their numbers swapped."""
    return (k & ~0b11110) | ((k & 0b110) << 2) | ((k & 0b11000) >> 2)


@gluon.jit
def hadamard(B: gl.constexpr, WIDTH: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """[WIDTH, WIDTH] with Hadamard matrices [B, B] on its diagonal, rows and columns swapped."""
    i = swapped(gl.arange(0, WIDTH, gl.SliceLayout(1, LAYOUT))).expand_dims(1)
    j = swapped(gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))).expand_dims(0)
    odd = i & j & (B - 1)
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    sign = gl.where((odd & 1) != 0, -1.0, 1.0)
    return gl.where(i // B == j // B, sign, 0.0).to(DTYPE)


@gluon.constexpr_function
def outputs_layout(WARPS, WIDTH):
    """Which outputs [16 * WARPS, WIDTH] a thread has: 8 neighbors are in neighboring registers."""
    columns = [[0, 1 << i] for i in range(WIDTH.bit_length() - 1)]
    rows = [[1 << i, 0] for i in range((16 * WARPS).bit_length() - 1)]
    registers, lanes = [*columns[:3], *columns[5:], rows[3]], [*columns[3:5], *rows[:3]]
    return gl.DistributedLinearLayout(registers, lanes, rows[4:], [], [16 * WARPS, WIDTH])


@gluon.jit
def halved(pieces):
    """The left and the right halves of values [n, k]; all stay in their registers."""
    ROWS: gl.constexpr = pieces[0].shape[0]
    HALF: gl.constexpr = pieces[0].shape[1] // 2
    halves = ()
    for i in gl.static_range(len(pieces)):
        halves = halves + gl.split(pieces[i].reshape([ROWS, 2, HALF]).permute([0, 2, 1]))
    return halves


@gluon.jit
def write_outputs(
    acc,
    row_block,
    first,
    output,
    B: gl.constexpr,
    LAYOUT: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """Write a row block's outputs from ``first`` on.

    32 at a time: there are no registers for the scales of more.

    output: (p_row_norms, p_input_scales, p_out, N, K) of the kernel.
    """
    p_row_norms, p_input_scales, p_out, N, K = output
    ROWS: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    values = acc.reshape([ROWS, WIDTH // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4])
    # Registers in the order of the outputs: they stay in their lanes.
    values = gl.convert_layout(values.reshape([ROWS, WIDTH]), LAYOUT, assert_trivial=True)
    pieces = (values,)
    for _ in gl.static_range(WIDTH.bit_length() - 6):
        pieces = halved(pieces)
    PIECE: gl.constexpr = pieces[0].type.layout
    n = row_block * ROWS + anew(gl.arange(0, ROWS, gl.SliceLayout(1, PIECE)))
    norms = gl.load(p_row_norms + n, mask=n < N, other=0.0) * B**-0.5
    p_rows = (p_out + n.to(gl.int64) * K).expand_dims(1)
    for i in gl.static_range(len(pieces)):
        k = anew(gl.to_tensor(first + i * 32)) + gl.arange(0, 32, gl.SliceLayout(0, PIECE))
        k = gl.max_contiguous(gl.multiple_of(k, 32), 32)
        scales = gl.load(p_input_scales + k, mask=k < K, other=0.0).to(gl.float32)
        scaled = pieces[i] * norms.expand_dims(1) * scales.expand_dims(0)
        m = (n < N).expand_dims(1) & (k < K).expand_dims(0)
        gl.store(p_rows + k.expand_dims(0), scaled.to(DTYPE), mask=m)


@gluon.jit
def finish_stores(x):
    """Have a warp finish the stores before this point; x is any int32.

    Otherwise the compiler delays them until the next sums need the registers of the stored ones.
    """
    gl.inline_asm_elementwise(
        "{ bar.warp.sync 0xffffffff; mov.b32 $0, $1; }", "=r,r", [x], gl.int32, False, 1
    )


@gluon.jit
def decode_unit(
    words,
    here,
    following,
    more,
    lookup,
    matrix,
    output,
    B: gl.constexpr,
    MMA: gl.constexpr,
    SHAPE: gl.constexpr,
):
    """Decode and write a tile per warp. Returns the words of the next one, if there is ``more``.

    words: of the tile; only those of its first quarter are loaded yet.
    here, following: (weight, place) of this unit and of the one after it.
    matrix: the Hadamard matrix, in shared memory.
    """
    place = here[1]
    ROWS: gl.constexpr = SHAPE[1] * 16
    WIDTH: gl.constexpr = matrix.shape[0]
    STAGES: gl.constexpr = WIDTH // 32  # of one product
    OUTPUTS: gl.constexpr = outputs_layout(SHAPE[1], WIDTH)
    index = gl.arange(0, SHAPE[1] * 128, lookup[1].type.layout)
    warp, word = anew(index // 128), index % 128
    p_words = word_pointers(here[0], place, warp, word, SHAPE)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, MMA)
    signs = ()
    for stage in gl.static_range(16):
        words = words_ahead(words, p_words, following, more, warp, word, stage, SHAPE)
        signs = signs_of_stage(signs, words, stage, SHAPE[0])
        a = decode_stage(lookup, words, signs, stage, matrix.dtype, MMA, SHAPE)
        h = matrix.slice(stage % STAGES * 32, 32, dim=1).permute([1, 0])
        acc = warpgroup_mma(a, h, acc, use_acc=stage % STAGES != 0, is_async=True)
        if stage % STAGES == STAGES - 1:
            acc = warpgroup_mma_wait(0, deps=[acc])
            first = place[2] * 512 + stage // STAGES * WIDTH
            write_outputs(acc, place[1], first, output, B, OUTPUTS, matrix.dtype)
            finish_stores(stage)
        else:
            wait_for_all_but_one_stage(stage)
    return words


@gluon.jit(do_not_specialize=["N"])
def dequantize_kernel(
    p_tiles,
    p_row_norms,
    p_input_scales,
    p_entries,
    p_out,
    N,
    K,
    INDEX_BITS: gl.constexpr,
    ENTRY_BITS: gl.constexpr,
    COPIES: gl.constexpr,
    B: gl.constexpr,
    WIDTH: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
):
    """out [N, K] = row_norms * unrotate(coordinates [N, K]) * input_scales.

    The units are those of the wide kernel, in the order of memory, divided among the programs.

    WIDTH: outputs at once, a multiple of the rotation block size B.
    """
    SHAPE: gl.constexpr = ((INDEX_BITS, ENTRY_BITS, COPIES), WARPS)
    ROWS: gl.constexpr = WARPS * 16
    MMA: gl.constexpr = sums_layout(WARPS, WIDTH)
    MATRIX: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WIDTH, WIDTH], DTYPE)
    ROW_MAJOR: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    table = make_table(SHAPE[0])
    matrix = gl.allocate_shared_memory(DTYPE, [WIDTH, WIDTH], MATRIX)

    input_tiles = (K + 511) // 512
    units = (N + ROWS - 1) // ROWS * input_tiles
    first = first_unit(gl.program_id(0), gl.num_programs(0), units, 1)
    last = first_unit(gl.program_id(0) + 1, gl.num_programs(0), units, 1)
    row_block = first // input_tiles
    weight = (p_tiles, 0, N)
    place = (input_tiles, row_block, first - row_block * input_tiles)
    prefetch_unit(weight, place, True, SHAPE)
    table.store(load_entries(p_entries, SHAPE[0], DTYPE, WARPS))
    matrix.store(hadamard(B, WIDTH, DTYPE, ROW_MAJOR))
    fence_async_shared()
    slot = gl.arange(0, WARPS * 128, words_layout(WARPS))
    p_tile = tile_pointers(weight, place, slot // 128, SHAPE)
    words = renew_words(no_words(slot, SHAPE), p_tile + slot % 128, True, 0, SHAPE)
    gl.barrier()

    lookup = (table, bank_of(slot // 4 % 32, SHAPE[0]))
    output = (p_row_norms, p_input_scales, p_out, N, K)
    for unit in range(first, last):
        more = unit + 1 < last
        here, following = (weight, place), (weight, next_place(place))
        prefetch_unit(weight, following[1], more, SHAPE)
        words = decode_unit(words, here, following, more, lookup, matrix, output, B, MMA, SHAPE)
        place = following[1]
