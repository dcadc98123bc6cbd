# mypy: ignore-errors
"""What the warps of the narrow kernels decode in a turn of their loop, and where it is.

These tuples are passed to the functions of the kernels:

- ``turn`` of the loop: (row tile, slice of the inputs, first row tile of the batch).
- ``weight``: (pointer to its tiles, input tiles, slices, warps of a row tile, row tiles at once,
  row tiles of a batch, end of the row tiles).
- ``place`` of a thread: (word in a tile, pointer to its token, row tile among those at once, half
  tile of the slice, offset of the bank that it looks up in).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qamw_kernels.ops.gluon.prefetch import prefetch, prefetch_bytes


@gluon.jit
def next_turn(turn, weight):
    """The turn after this one."""
    row_tile, s, first = turn
    _, _, slices, _, at_once, batch, end = weight
    stop = gl.minimum(first + batch, end)
    row_tile += at_once
    s = gl.where(row_tile >= stop, s + 1, s)
    row_tile = gl.where((row_tile >= stop) & (s < slices), first, row_tile)
    first = gl.where(s == slices, stop, first)
    s = gl.where(s == slices, 0, s)
    return row_tile, s, first


@gluon.jit
def seat_of(warp, weight, WARPS: gl.constexpr):
    """Which row tile and which half tile a warp has; one left over has none of the inputs."""
    _, _, _, each, at_once, _, _ = weight
    half = gl.where(warp < each * at_once, warp % each, WARPS * 1024)
    return gl.minimum(warp // each, at_once - 1), half


@gluon.jit
def tiles_of_turn(turn, weight, INDEX_BITS: gl.constexpr):
    """Pointer to the first tile of a turn's first row tile, the same for all threads."""
    p_tiles, input_tiles, _, _, _, _, end = weight
    row_tile = gl.minimum(turn[0], end - 1).to(gl.int64)
    return p_tiles + row_tile * input_tiles * (INDEX_BITS * 128)


@gluon.jit
def tile_of_seat(turn, sub, half, weight, INDEX_BITS: gl.constexpr, WARPS: gl.constexpr):
    """Offset of a warp's tile from :func:`tiles_of_turn`.

    Instead of tiles past the end others are read: activations past the end are zeros, and rows past
    the end are not written.
    """
    _, input_tiles, _, _, _, _, end = weight
    row_tile = gl.where(turn[0] + sub < end, sub, 0)
    tile = gl.minimum(turn[1] * (WARPS // 2) + (half >> 1), input_tiles - 1)
    return (row_tile * input_tiles + tile) * (INDEX_BITS * 128)


@gluon.jit
def prefetch_turn(turn, weight, K, RATE: gl.constexpr, WARPS: gl.constexpr):
    """Prefetch the tiles of a turn, if there is such a turn; one of two warps on a tile does it.

    If the inputs end in the first half of a tile, only the entries of that half are prefetched.
    """
    end = weight[6]
    thread = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    sub, half = seat_of(thread // 32, weight, WARPS)
    sub = gl.where((thread % 32 == 0) & ((half & 1) == 0), sub, 1 << 20)  # others have no tile
    first = turn[1] * WARPS + half
    p_tile = tiles_of_turn(turn, weight, RATE[0])
    p_tile += tile_of_seat(turn, sub, half, weight, RATE[0], WARPS)
    m_tile = (turn[0] + sub < end) & (first * 256 < K)
    whole = (first + 1) * 256 < K
    prefetch(p_tile, m_tile & whole, prefetch_bytes(RATE[0] * 512))
    prefetch(p_tile, m_tile & (whole == 0), prefetch_bytes((RATE[1] + 1) // 2 * 512))
