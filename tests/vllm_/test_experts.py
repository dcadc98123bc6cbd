"""Routing of tokens to experts."""

import pytest
import torch

pytest.importorskip("vllm")

from qamw_kernels.ops.routing import sort_slots


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's kernel needs CUDA")
@pytest.mark.parametrize("parallel", [False, True])
def test_slots_are_sorted_as_vllm_sorts_them(parallel: bool) -> None:
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    expert_map = None
    if parallel:
        expert_map = torch.tensor([-1, 0, -1, 1, -1, 2], dtype=torch.int32, device="cuda")
    for num_tokens in (1, 5, 300):
        chosen = torch.randint(0, 6, (num_tokens, 2), dtype=torch.int32, device="cuda")
        ours = sort_slots(chosen, 16, 6, expert_map)
        theirs = moe_align_block_size(chosen, 16, 6, expert_map)
        used = int(ours.num_sorted)
        assert int(theirs[2]) == used
        experts = ours.experts[: used // 16]
        assert torch.equal(experts, theirs[1][: used // 16])
        # The order inside an expert is free.
        blocks = [slots[:used].view(-1, 16).sort(1).values for slots in (ours.slots, theirs[0])]
        for expert in set(experts.tolist()) - {-1}:
            own = experts == expert
            assert torch.equal(*(block[own].flatten().sort().values for block in blocks))
