"""Tensor parallelism: among how many ranks a model can be cut, and which rotation blocks allow it.

A layer that is cut along its inputs must give every rank whole rotation blocks and whole packing
units of 64 inputs. Rows are independent of each other, so a layer can be cut between any two rows.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from qamw_kernels.errors import TensorError
from qamw_kernels.format.defaults import TP_MAX
from qamw_kernels.format.packing import UNIT_INPUTS

MAX_ROTATION_BLOCK_SIZE = 128
"""Widest rotation block that is chosen; the format allows more."""


def differs(config: Any, name: str) -> bool:
    """Whether layers differ in a setting: reading it from the config then fails (Gemma 4)."""
    try:
        getattr(config, name, None)
    except Exception:  # of transformers' own kind
        return True
    return False


def shared_setting(config: Any, name: str) -> Any:
    """A value of a model's config; None where it has none, or where its layers differ."""
    return None if differs(config, name) else getattr(config, name, None)


def attention_heads(config: Any) -> tuple[int | None, int | None]:
    """Numbers of attention heads and of key/value heads; None where not known."""
    num_heads = shared_setting(config, "num_attention_heads")
    return num_heads, shared_setting(config, "num_key_value_heads") or num_heads


def possible_tensor_parallel_sizes(
    num_heads: int | None,
    num_kv_heads: int | None,
    tp_max: int = TP_MAX,
) -> list[int]:
    """Sizes 1..tp_max that vLLM can cut the attention heads into.

    Powers of two where the number of heads is not known.
    """
    if num_heads is None or num_kv_heads is None:
        return [tp for tp in (2**i for i in range(tp_max.bit_length())) if tp <= tp_max]
    return [
        tp
        for tp in range(1, tp_max + 1)
        if num_heads % tp == 0 and (num_kv_heads % tp == 0 or tp % num_kv_heads == 0)
    ]


def choose_rotation_block_sizes(
    layers: Iterable[tuple[int, bool]],
    tp_sizes: Sequence[int],
) -> dict[int, int]:
    """Hadamard width for every number of inputs.

    It is the largest power of two <= 128 that divides every shard. Tensor-parallel sizes that would
    cut through a packing unit are impossible anyway, and are ignored.

    Args:
        layers: (number of inputs, whether tensor parallelism cuts them) of every layer.
        tp_sizes: tensor-parallel sizes to prepare for.
    """
    sizes: dict[int, int] = {}
    for num_inputs, row_parallel in layers:
        shards = (
            [num_inputs // tp for tp in tp_sizes if num_inputs % (tp * UNIT_INPUTS) == 0]
            if row_parallel
            else []
        )
        for width in [num_inputs, *shards]:
            largest = min(width & -width, MAX_ROTATION_BLOCK_SIZE)
            sizes[num_inputs] = min(largest, sizes.get(num_inputs, largest))
    return sizes


def can_split_inputs(num_inputs: int, tp: int, rotation_block_size: int) -> bool:
    """Whether each of ``tp`` ranks gets whole rotation blocks and packing units."""
    return num_inputs % (tp * _input_unit(rotation_block_size)) == 0


def can_split_rows(num_rows: int, tp: int, kv_rows: int | None = None) -> bool:
    """Whether ``tp`` ranks can share the rows of a layer that is cut along its outputs.

    Args:
        kv_rows: rows of the key and value projections, whose heads vLLM repeats on several ranks
            where there are fewer heads than ranks; None where the model has no such layer.
    """
    return num_rows % tp == 0 or num_rows == kv_rows


def possible_input_splits(num_inputs: int, rotation_block_size: int) -> list[int]:
    """All numbers of ranks that :func:`can_split_inputs` allows."""
    most = num_inputs // _input_unit(rotation_block_size)
    return [
        tp for tp in range(1, most + 1) if can_split_inputs(num_inputs, tp, rotation_block_size)
    ]


def check_input_split(
    name: str,
    num_inputs: int,
    num_inputs_of_rank: int,
    rotation_block_size: int,
) -> None:
    """Check that the inputs of one rank are whole rotation blocks and packing units.

    Args:
        name: the layer, for the message.
        num_inputs: of the whole layer.
        num_inputs_of_rank: of its shard on one rank.
    Raises:
        TensorError: they are not; the message lists the possible numbers of ranks.
    """
    unit = _input_unit(rotation_block_size)
    if num_inputs_of_rank % unit:
        possible = possible_input_splits(num_inputs, rotation_block_size)
        smaller_blocks = "Quantize with a larger --tp-max for more."
        ignored = "Quantize with this module ignored (--ignore) for more."
        raise TensorError(
            f"{name}: tensor_parallel_size={num_inputs // num_inputs_of_rank} leaves "
            f"{num_inputs_of_rank} of the {num_inputs} inputs to a rank, expected a multiple of "
            f"{unit} (rotation blocks of {rotation_block_size}, packed units of {UNIT_INPUTS}). "
            f"Possible for this layer: {', '.join(map(str, possible))}. "
            + (smaller_blocks if rotation_block_size > UNIT_INPUTS else ignored)
        )


def _input_unit(rotation_block_size: int) -> int:
    """Inputs that must stay together; both are powers of two."""
    return max(UNIT_INPUTS, rotation_block_size)
