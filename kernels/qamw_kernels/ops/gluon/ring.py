# mypy: ignore-errors
"""A ring of blocks of activations in shared memory, which the copy engine of sm_90 fills.

All warps of a program read the same blocks, in the order of the tiles along the inputs: those of
one row block after those of the one before, from the first input again.

``copies`` of a program are (token, number of its blocks, input tiles, k of the next block to copy);
they are started as places become free.
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
def start_copy(ring, block, copies):
    """Start the copy of block number ``block``, the next one, if there is one.

    Returns ``copies`` after that.
    """
    x_blocks, places, full = ring
    token, blocks, input_tiles, k = copies
    BLOCK_INPUTS: gl.constexpr = x_blocks.block_shape[1]
    place, wanted = block & (places.shape[0] - 1), block < blocks
    mbarrier.expect(full.index(place), x_blocks.nbytes_per_cta, wanted)
    copy_block(x_blocks, [token, k], full.index(place), places.index(place), wanted)
    k = gl.where(k + BLOCK_INPUTS < input_tiles * 512, k + BLOCK_INPUTS, 0)
    return token, blocks, input_tiles, k


@gluon.jit
def wait_for(ring, block):
    """Until a program's ``block``-th block of activations is in its place."""
    _, places, full = ring
    PLACES: gl.constexpr = places.shape[0]
    mbarrier.wait(full.index(block & (PLACES - 1)), block // PLACES & 1)
