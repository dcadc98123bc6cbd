"""Tensor parallelism: how wide a model can be cut, and rotation blocks that survive it."""

from collections.abc import Iterable, Sequence

from qamw_kernels.format.packing import UNIT_INPUTS

TP_MAX = 8  # widest tensor parallelism that is prepared for, unless asked otherwise
MAX_ROTATION_BLOCK_SIZE = 128  # chosen; the format allows more


def possible_tensor_parallel_sizes(num_heads: int | None, num_kv_heads: int | None, tp_max: int = TP_MAX) -> list[int]:
    """Sizes 1..tp_max that vLLM can cut the attention heads into; powers of two where the heads are not known."""
    if num_heads is None or num_kv_heads is None:
        return [t for t in (2**i for i in range(tp_max.bit_length())) if t <= tp_max]
    return [t for t in range(1, tp_max + 1) if num_heads % t == 0 and (num_kv_heads % t == 0 or t % num_kv_heads == 0)]


def choose_rotation_block_sizes(layers: Iterable[tuple[int, bool]], tp_sizes: Sequence[int]) -> dict[int, int]:
    """Hadamard width for every number of inputs: the largest power of two <= 128 that divides every shard.

    Args:
        layers: (number of inputs, whether tensor parallelism cuts them) of every layer. Shards that break a packing unit are
            impossible anyway.
    """
    sizes: dict[int, int] = {}
    for num_inputs, row_parallel in layers:
        shards = [num_inputs // t for t in tp_sizes if num_inputs % (t * UNIT_INPUTS) == 0] if row_parallel else []
        for width in [num_inputs, *shards]:
            largest = min(width & -width, MAX_ROTATION_BLOCK_SIZE)
            sizes[num_inputs] = min(largest, sizes.get(num_inputs, largest))
    return sizes
