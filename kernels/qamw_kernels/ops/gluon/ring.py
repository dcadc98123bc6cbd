# mypy: ignore-errors
"""A ring of blocks of activations in shared memory, which the copy engine of sm_90 fills.

All warps of a program read the same blocks, in the order of the tiles along the inputs: those of
one row block after those of the one before, from the first input again.

``copies`` of a program are (token, number of its blocks that are left, input tiles, k of the next
one); they are started as places become free. Blocks take the places in turn, again and again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.9 has the first name, older ones the second.
copy_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def make_ring(x_blocks, PLACES: gl.constexpr, DTYPE: gl.constexpr):
    """The descriptor of the activations, places for blocks of them, and a barrier for each."""
    TOKENS: gl.constexpr = x_blocks.block_shape[0]
    BLOCK_INPUTS: gl.constexpr = x_blocks.block_shape[1]
    places = gl.allocate_shared_memory(DTYPE, [PLACES, TOKENS, BLOCK_INPUTS], x_blocks.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
    return x_blocks, places, full


@gluon.jit
def start_copy(ring, PLACE: gl.constexpr, copies):
    """Start the copy of the next block, if there is one. Returns ``copies`` after that."""
    x_blocks, places, full = ring
    token, left, input_tiles, k = copies
    BLOCK_INPUTS: gl.constexpr = x_blocks.block_shape[1]
    mbarrier.expect(full.index(PLACE), x_blocks.nbytes_per_cta, left > 0)
    copy_block(x_blocks, [token, k], full.index(PLACE), places.index(PLACE), left > 0)
    k = gl.where(k + BLOCK_INPUTS < input_tiles * 512, k + BLOCK_INPUTS, 0)
    return token, left - 1, input_tiles, k


@gluon.jit
def wait_for(ring, PLACE: gl.constexpr, turn):
    """Until the block is there that a place has the ``turn``-th time, from 0 on."""
    mbarrier.wait(ring[2].index(PLACE), turn & 1)
