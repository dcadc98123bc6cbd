# mypy: ignore-errors
"""A ring of blocks of activations in shared memory, which the copy engine of sm_90 fills.

All warps of a program read the same blocks, in the order of the tiles along the inputs: those of
one row block after those of the one before, from the first input again.

``copies`` is what a program has yet to copy: (tokens, number of blocks left, input tiles, k of the
next block). Copies are started as places become free; blocks take the places in turn, again and
again. ``tokens`` is (first token of the block,) if all blocks of the program have the same tokens,
or (first token of the block, row blocks left with these tokens, number of all row blocks).
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
def next_tokens(tokens, ends, TOKENS: gl.constexpr):
    """The tokens of the next block; ``ends``: whether this block is the last of a row block."""
    if len(tokens) == 3:
        token, left, row_blocks = tokens
        left -= ends.to(gl.int32)
        token = gl.where(left == 0, token + TOKENS, token)
        tokens = token, gl.where(left == 0, row_blocks, left), row_blocks
    return tokens


@gluon.jit
def start_copy(ring, PLACE: gl.constexpr, copies):
    """Start the copy of the next block, if there is one. Returns ``copies`` after that."""
    x_blocks, places, full = ring
    tokens, left, input_tiles, k = copies
    BLOCK_INPUTS: gl.constexpr = x_blocks.block_shape[1]
    mbarrier.expect(full.index(PLACE), x_blocks.nbytes_per_cta, left > 0)
    copy_block(x_blocks, [tokens[0], k], full.index(PLACE), places.index(PLACE), left > 0)
    ends = k + BLOCK_INPUTS >= input_tiles * 512
    tokens = next_tokens(tokens, ends, x_blocks.block_shape[0])
    return tokens, left - 1, input_tiles, gl.where(ends, 0, k + BLOCK_INPUTS)


@gluon.jit
def wait_for(ring, PLACE: gl.constexpr, turn):
    """Wait until a place has received its block number ``turn``, counted from 0."""
    mbarrier.wait(ring[2].index(PLACE), turn & 1)
