"""Which expert works on which slot of a mixture of experts, in blocks that a GEMM can take.

Token t sent to top_k experts fills the slots t * top_k .. t * top_k + top_k - 1. They are sorted by
expert and each expert's slots padded to whole blocks, so that every block belongs to one expert.
Slots of experts of other ranks are left out. The result is that of vLLM's ``moe_align_block_size``
with ``ignore_invalid_experts``, which is one kernel on CUDA.
"""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Slots in blocks of one expert each.

    Attributes:
        slots: int32, block after block; T * top_k is padding, where a block is not full.
        experts: int32, the expert of each block, as numbered on this rank; -1 for a block to skip,
            and any value after the last block in use.
        num_sorted: [1] int32, number of slots in use, padding included: the tensors are long enough
            for any routing.
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
    if expert_map is not None:  # experts that are not here get the highest number
        flat = torch.where(expert_map[flat] < 0, num_experts, expert_map[flat]).long()
    counts = (flat[:, None] == torch.arange(num_experts, device=device)).sum(0)
    own_blocks = (counts + block_size - 1) // block_size
    ends = own_blocks.cumsum(0)
    order = flat.argsort(stable=True)
    expert = flat[order]
    # padding before the first slot of each expert
    padding = (ends - own_blocks) * block_size - (counts.cumsum(0) - counts)
    places = torch.arange(len(flat), device=device) + torch.cat([padding, ends[-1:]])[expert]
    places = torch.where(expert < num_experts, places, blocks * block_size)
    slots = torch.full((blocks * block_size + 1,), flat.numel(), device=device)
    slots[places] = order
    experts = torch.searchsorted(ends, torch.arange(blocks, device=device), right=True)
    experts = torch.where(experts < num_experts, experts, -1)
    return Routing(slots[:-1].int(), experts.int(), (ends[-1:] * block_size).int(), block_size)
