"""The integer formats that are measured beside ours, where their packages are installed."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.check import DTYPE

Layer = Callable[[torch.Tensor], torch.Tensor]


def marlin(num_rows: int, num_inputs: int, bits: int) -> Layer:
    """A linear layer with Marlin's weights of groups of 128."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    weight = torch.randn(num_inputs, num_rows, dtype=DTYPE, device="cuda") / num_inputs**0.5
    workspace = marlin_utils.marlin_make_workspace_new(weight.device)
    empty = torch.empty(0, dtype=torch.int32, device="cuda")
    quantize, order = marlin_utils_test.marlin_quantize, dict[str, Any]()
    if "act_order" in inspect.signature(quantize).parameters:  # vLLM 0.29 and older
        packed, scales = quantize(weight, kind, 128, act_order=False)[1:3]
        order = {"g_idx": empty, "g_idx_sort_indices": empty, "is_k_full": True}
    else:
        packed, scales = quantize(weight, kind, 128)[1:3]
    return lambda x: marlin_utils.apply_gptq_marlin_linear(
        input=x,
        weight=packed,
        weight_scale=scales,
        weight_zp=empty,
        workspace=workspace,
        wtype=kind,
        output_size_per_partition=num_rows,
        input_size_per_partition=num_inputs,
        **order,
    )


def humming(num_rows: int, num_inputs: int, bits: int) -> Layer:
    """A linear layer with Humming's integers in groups of 128.

    It has 5 and 6 bits: the formats that are nearest to ours in size.
    """
    from humming.layer import HummingLayer

    with torch.device("cuda"):
        config = {"dtype": f"int{bits}", "group_size": 128}
        layer = HummingLayer(num_rows, num_inputs, config, torch_dtype=DTYPE)
        weight = torch.randn(num_rows, num_inputs, dtype=DTYPE) / num_inputs**0.5
        layer.load_from_unquantized(weight)
        layer.transform()
    return layer


PEERS: dict[str, tuple[Callable[[int, int, int], Layer], int]] = {
    "marlin-int4": (marlin, 4),
    "marlin-int8": (marlin, 8),
    "humming-int5": (humming, 5),
    "humming-int6": (humming, 6),
}
"""Name -> (what makes a layer [N, K], its bits)."""
