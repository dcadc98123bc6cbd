"""Tensor parallelism: into how many ranks a model splits, and rotation blocks that allow it."""

import re
from types import SimpleNamespace

import pytest

from qamw_kernels.errors import TensorError
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.format.sharding import (
    attention_heads,
    can_split_inputs,
    can_split_rows,
    check_input_split,
    choose_rotation_block_sizes,
    possible_input_splits,
    possible_tensor_parallel_sizes,
)


def test_heads_of_a_model() -> None:
    assert attention_heads(SimpleNamespace(num_attention_heads=9, num_key_value_heads=3)) == (9, 3)
    assert attention_heads(SimpleNamespace(num_attention_heads=9)) == (9, 9)
    assert attention_heads(None) == (None, None)


def test_tensor_parallel_choices() -> None:
    assert possible_tensor_parallel_sizes(9, 3) == [1, 3]
    assert possible_tensor_parallel_sizes(14, 2) == [1, 2]
    assert possible_tensor_parallel_sizes(32, 8) == [1, 2, 4, 8]
    assert possible_tensor_parallel_sizes(None, None) == [1, 2, 4, 8]
    widths = [(4096, False), (4096, True), (14336, True)]
    assert choose_rotation_block_sizes(widths, [1, 2, 4, 8]) == {4096: 128, 14336: 128}
    # 896 = 7 x 128: alone it takes blocks of 128, split in two only of 64.
    assert choose_rotation_block_sizes([(896, True)], [1, 2]) == {896: 64}
    assert choose_rotation_block_sizes([(896, False)], [1, 2]) == {896: 128}


@pytest.mark.parametrize(
    ("num_inputs", "rotation_block_size", "splits"),
    [
        (4096, 128, [1, 2, 4, 8, 16, 32]),
        (896, 128, [1, 7]),
        (896, 64, [1, 2, 7, 14]),
        (576, 64, [1, 3, 9]),
        (64, 16, [1]),  # a packing unit is not split, whatever the rotation blocks
        (256, 16, [1, 2, 4]),
    ],
)
def test_possible_input_splits(
    num_inputs: int, rotation_block_size: int, splits: list[int]
) -> None:
    assert possible_input_splits(num_inputs, rotation_block_size) == splits
    for tp in range(1, 2 * num_inputs // UNIT_INPUTS):
        assert can_split_inputs(num_inputs, tp, rotation_block_size) == (tp in splits)


def test_chosen_rotation_blocks_allow_every_possible_split() -> None:
    """Where whole packing units allow a split, the rotation blocks chosen for it do too."""
    for num_inputs in range(UNIT_INPUTS, 4096, UNIT_INPUTS):
        sizes = [1, 2, 3, 4, 6, 8]
        block = choose_rotation_block_sizes([(num_inputs, True)], sizes)[num_inputs]
        for tp in sizes:
            assert can_split_inputs(num_inputs, tp, block) == (num_inputs % (tp * UNIT_INPUTS) == 0)


def test_rows_are_shared_alike_or_repeated() -> None:
    assert can_split_rows(4096, 8) and not can_split_rows(4096, 3)
    # Key and value heads: vLLM repeats them where there are fewer than ranks.
    assert can_split_rows(192, 9, kv_rows=192) and not can_split_rows(192, 9, kv_rows=64)


def test_a_split_that_fits_is_accepted() -> None:
    for tp in possible_input_splits(14336, 128):
        check_input_split("down_proj", 14336, 14336 // tp, 128)


@pytest.mark.parametrize(
    ("num_inputs", "of_rank", "block", "message"),
    [
        (
            896,
            448,
            128,
            "down_proj: tensor_parallel_size=2 leaves 448 of the 896 inputs to a rank, expected a "
            "multiple of 128 (rotation blocks of 128, packed units of 64). Possible for this "
            "layer: 1, 7.",
        ),
        (
            576,
            288,
            64,
            "down_proj: tensor_parallel_size=2 leaves 288 of the 576 inputs to a rank, expected a "
            "multiple of 64 (rotation blocks of 64, packed units of 64). Possible for this "
            "layer: 1, 3, 9.",
        ),
    ],
)
def test_a_split_that_breaks_a_block_is_refused(
    num_inputs: int, of_rank: int, block: int, message: str
) -> None:
    with pytest.raises(TensorError, match=re.escape(message)) as refused:
        check_input_split("down_proj", num_inputs, of_rank, block)
    # A larger tp_max helps only where the rotation blocks are wider than a packing unit.
    assert ("larger" in str(refused.value)) == (block > UNIT_INPUTS)
