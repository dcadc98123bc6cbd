"""Slots are sorted by expert; tests/vllm_/test_experts.py compares that with vLLM's own kernel."""

import pytest
import torch

from qamw_kernels.ops.routing import sort_slots


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_slots_are_sorted(device: str) -> None:
    """What vLLM's moe_align_block_size promises.

    Each expert's slots in order, padded to whole blocks.
    """
    chosen = torch.tensor([[2, 0], [2, 3], [2, 0]], device=device)
    slots, experts, num_sorted, _ = sort_slots(chosen, 4, 5)
    assert num_sorted.tolist() == [12]
    assert experts.tolist()[:3] == [0, 2, 3] and set(experts.tolist()[3:]) == {-1}
    assert slots.tolist()[:12] == [1, 5, 6, 6, 0, 2, 4, 6, 3, 6, 6, 6]


def test_slots_of_other_ranks_are_left_out() -> None:
    """Experts have the numbers of this rank, which are not in the order of all ranks."""
    chosen = torch.tensor([[2, 0], [2, 3], [2, 0]])
    numbers = torch.tensor([-1, -1, 1, 0, -1], dtype=torch.int32)
    slots, experts, num_sorted, _ = sort_slots(chosen, 4, 5, numbers)
    assert num_sorted.tolist() == [8]
    assert experts.tolist()[:2] == [0, 1] and set(experts.tolist()[2:]) == {-1}
    assert slots.tolist()[:8] == [3, 6, 6, 6, 0, 2, 4, 6]
