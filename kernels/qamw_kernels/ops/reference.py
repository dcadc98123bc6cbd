"""The ops in plain torch: the reference of the kernels, and what runs on CPU tensors."""

import torch

from qamw_kernels.codec.rotation import rotate
from qamw_kernels.codec.trellis import codebook_rows
from qamw_kernels.format.codebook import TRELLIS, flip_signs
from qamw_kernels.ops.routing import Routing
from qamw_kernels.ops.tiling import untile
from qamw_kernels.ops.weight import TiledWeight


def coordinates(weight: TiledWeight) -> torch.Tensor:
    """Rotated, normalized weight [N, K] float32: the codewords that the indices stand for."""
    words = weight.entry_words[:, None].contiguous()
    codebook = flip_signs(words.view(torch.bfloat16).float())
    indices = untile(weight.tiles, weight.num_rows, weight.num_inputs, weight.code)  # [N, P]
    rows = codebook_rows(indices, weight.index_bits) if weight.code == TRELLIS else indices
    return codebook[rows.int()].flatten(1)


def linear(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The op ``qamw::linear``: x [M, K] to [M, N] in its dtype, computed in float32."""
    rotated = rotate(x.float() * weight.input_scales.float(), weight.rotation_block_size)
    y = rotated @ coordinates(weight).T * weight.row_norms
    return (y if bias is None else y + bias.float()).to(x.dtype)


def routed_linear(
    x: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    num_slots: int,
) -> torch.Tensor:
    """The op ``qamw::routed_linear``: one expert after the other, with the slots sent to it."""
    y = x.new_zeros(num_slots, weight.num_rows)
    blocks = routing.slots[: int(routing.num_sorted)].view(-1, routing.block_size)
    for own, expert in zip(blocks.long(), routing.experts.tolist(), strict=False):
        own = own[own < num_slots]
        if expert >= 0:
            tokens = x[own // (num_slots // len(x))]
            y[own] = linear(tokens, weight.expert(expert), None)
    return y


def combine(y: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The op ``qamw::combine``, one slot of every token after the other, in float32."""
    out = y.new_zeros(len(shares), y.shape[1], dtype=torch.float32)
    slots = y.view(*shares.shape, y.shape[1])
    for i in range(shares.shape[1]):
        out += slots[:, i] * shares[:, i, None]
    return out.to(y.dtype)
