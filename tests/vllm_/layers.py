"""Layers as vLLM makes them, and what a checkpoint delivers to them."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading
from vllm.platforms import current_platform

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.format.codebook import PLAIN
from qamw_kernels.format.config import QamwFormat
from qamw_vllm.backend import Backend
from qamw_vllm.config import QamwConfig

needs_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="layers are built on the CPU")

BITS = 11
K = 256
HEAD = 64
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# kind: rows of every matrix in the layer. k and v have 2 heads of 64, so TP 4 replicates them.
ROWS = {
    "qkv_proj": [256, 128, 128],
    "gate_up_proj": [512, 512],
    "fc1": [512],
    "o_proj": [256],
    "fc": [192],
}
SHARD_IDS: dict[str, list[Any]] = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": [0, 1]}

Tensors = dict[str, torch.Tensor]


def make_config(backend: Backend | None = None, **changes: Any) -> QamwConfig:
    """As vLLM makes it from config.json; ``changes`` are fields of QamwFormat."""
    fields = {
        "index_bits": BITS,
        "rotation_block_sizes": {K: 64},
        "ignore": ("lm_head",),
        **changes,
    }
    config = QamwConfig.from_config(QamwFormat(**fields).to_dict())
    config.backend = backend
    config.packed_modules_mapping = PARTS
    return config


def make_layer(
    kind: str,
    config: QamwConfig,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A LinearBase of vLLM, a key of ROWS, as it is when all layers of a model are made."""
    layer = _make_layer(kind, config, bias, dtype)
    record_metadata_for_reloading(layer)
    if config.online_plan:
        layer.quant_method.start(layer)
    return layer


def _make_layer(kind: str, config: QamwConfig, bias: bool, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {
        "bias": bias,
        "params_dtype": dtype,
        "quant_config": config,
        "prefix": f"model.layers.0.{kind}",
    }
    if kind == "qkv_proj":
        return QKVParallelLinear(K, HEAD, 4, 2, **options)
    if kind == "gate_up_proj":
        return MergedColumnParallelLinear(K, ROWS[kind], **options)
    classes: dict[str, type[LinearBase]] = {
        "fc1": ColumnParallelLinear,
        "o_proj": RowParallelLinear,
        "fc": ReplicatedLinear,
    }
    return classes[kind](K, ROWS[kind][0], **options)


def make_checkpoint(
    kind: str, bias: bool = False, seed: int = 0, code: str = PLAIN
) -> list[Tensors]:
    """The tensors of every matrix in a layer, with ``weight``, the decoded reference."""
    generator = torch.Generator().manual_seed(seed + len(kind))
    matrices = []
    for rows in ROWS[kind]:
        weight = torch.randn(rows, K, generator=generator)
        quantized = encode_weight(weight, BITS, 64, make_input_scales(K), code=code)
        tensors = {**quantized.tensors(), "weight": decode_weight(quantized)}
        if bias:
            tensors["bias"] = torch.randn(rows, generator=generator)
        matrices.append(tensors)
    return matrices


def deliver(
    layer: Any,
    kind: str,
    matrices: list[Tensors],
    fused_on_disk: bool = False,
) -> None:
    """Hand the stored tensors to the layer's loaders, as vLLM's models do."""
    if fused_on_disk:
        dims = {"qweight": 1, "row_norms": 0, "bias": 0}
        fused = {
            name: torch.cat([matrix[name] for matrix in matrices], dim)
            for name, dim in dims.items()
            if name in matrices[0]
        }
        matrices = [{**fused, "input_scales": matrices[0]["input_scales"]}]
    parameters = dict(layer.named_parameters())
    for position, tensors in enumerate(matrices):
        shard = [] if fused_on_disk or kind not in SHARD_IDS else [SHARD_IDS[kind][position]]
        for name, tensor in tensors.items():
            if name != "weight":
                parameters[name].weight_loader(parameters[name], tensor, *shard)


def load(
    layer: Any,
    kind: str,
    matrices: list[Tensors],
    fused_on_disk: bool = False,
) -> None:
    """:func:`deliver`, and have the layer process what arrived."""
    deliver(layer, kind, matrices, fused_on_disk)
    layer.quant_method.process_weights_after_loading(layer)
