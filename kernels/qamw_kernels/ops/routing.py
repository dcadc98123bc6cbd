"""Which expert works on which slot of a mixture of experts, in blocks that a GEMM can take.

Token t sent to top_k experts fills the slots t * top_k .. t * top_k + top_k - 1. They are sorted by
expert and each expert's slots padded to whole blocks, so that every block belongs to one expert.
The result is that of vLLM's ``moe_align_block_size``, which is one kernel on CUDA.
"""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Slots in blocks of one expert each.

    Attributes:
        slots: int32, block after block, T * top_k where a block is not full.
        experts: int32, of each block, numbered on this rank; -1 for one of another rank.
        num_sorted: [1] int32, slots and padding that are in use: the tensors are as long as any
            routing needs.
        block_size: slots in a block.
    """

    slots: torch.Tensor
    experts: torch.Tensor
    num_sorted: torch.Tensor
    block_size: int


def sort_slots(
    top_k_index: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
) -> Routing:
    """Sort slots by expert; shapes depend on no data, and the host waits for nothing.

    Args:
        top_k_index: [T, top_k] integers in 0 .. num_experts - 1.
        block_size: slots of one expert that a program takes.
        expert_map: [num_experts] int32, the number of an expert on this rank, -1 for one of another
            rank; None where all are here.
    """
    flat, device = top_k_index.flatten().long(), top_k_index.device
    blocks = -(-flat.numel() // block_size) + num_experts
    counts = (flat[:, None] == torch.arange(num_experts, device=device)).sum(0)
    own_blocks = (counts + block_size - 1) // block_size
    ends = own_blocks.cumsum(0)
    order = flat.argsort(stable=True)
    expert = flat[order]
    # slots of padding before those of an expert
    padding = (ends - own_blocks) * block_size - (counts.cumsum(0) - counts)
    slots = torch.full((blocks * block_size,), flat.numel(), device=device)
    slots[torch.arange(len(flat), device=device) + padding[expert]] = order
    experts = torch.searchsorted(ends, torch.arange(blocks, device=device), right=True)
    here = torch.arange(num_experts, device=device) if expert_map is None else expert_map.long()
    experts = torch.cat([here, here.new_full((1,), -1)])[experts]
    return Routing(slots.int(), experts.int(), (ends[-1:] * block_size).int(), block_size)
