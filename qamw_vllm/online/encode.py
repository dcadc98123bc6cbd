"""One weight, quantized while loading."""

import torch

from qamw_kernels.codec.encode import (
    InputShard,
    encode_weight,
    forget_tables,
    make_input_scales,
)
from qamw_kernels.format.weight import QuantizedWeight
from qamw_vllm.online.plan import OnlinePlan
from qamw_vllm.parallel import slice_of_rank


def encode_shard(
    weight: torch.Tensor,
    name: str,
    plan: OnlinePlan,
    num_inputs: int,
    rotation_block_size: int,
    tp_rank: int,
) -> QuantizedWeight:
    """Quantize this rank's part of a weight. The result is a part of the whole quantized weight.

    Ranks that hold only some of the inputs share the norms of the whole rows: all of them must call
    this for the same weight at the same time.

    Args:
        weight: [N of this rank, K of this rank] floating point.
        name: the tensor's name, for errors.
        num_inputs: K of the whole weight.
        tp_rank: this rank's position among those that hold parts of the same rows.
    Raises:
        TensorError: a value is NaN or infinite.
    """
    input_scales, shard = make_input_scales(num_inputs), None
    if weight.shape[1] != num_inputs:
        input_scales = slice_of_rank(input_scales, 0, weight.shape[1], tp_rank).clone()
        shard = InputShard(num_inputs, plan.sum_over_ranks)
    quantized = encode_weight(
        weight,
        plan.index_bits,
        rotation_block_size,
        input_scales,
        name,
        shard=shard,
        code=plan.code,
    )
    forget_tables()  # vLLM's sleep mode may free their memory
    return quantized
