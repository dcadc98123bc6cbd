"""Layers whose model class hands out the rows of a weight to the ranks in its own way."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.mamba.mamba_mixer2 import mamba_v2_sharded_weight_loader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.errors import TensorError
from qamw_vllm.config import QamwConfig
from qamw_vllm.online.plan import OnlinePlan
from tests.vllm_.layers import BITS, K, Tensors, make_config, needs_cpu

pytestmark = needs_cpu

Rank = Callable[[int, int], None]
TP = 2
# As Mamba-2 with one group of states: what both ranks have is counted twice in the layer.
SHARDS = [(128, 0, False), (64, 32, True), (32, 0, False)]
ROWS_OF_LAYER, ROWS_ON_DISK = 224, 192


def make_layer(tp_rank: int, config: QamwConfig | None = None) -> Any:
    layer = ColumnParallelLinear(
        K,
        ROWS_OF_LAYER,
        bias=False,
        params_dtype=torch.float32,
        quant_config=config or make_config(),
        prefix="model.layers.0.in_proj",
    )
    layer.weight.weight_loader = mamba_v2_sharded_weight_loader(SHARDS, TP, tp_rank)
    record_metadata_for_reloading(layer)
    layer.quant_method.take_loader()
    return layer


def make_tensors(packed: bool, seed: int = 0) -> Tensors:
    weight = torch.randn(ROWS_ON_DISK, K, generator=torch.Generator().manual_seed(seed))
    if not packed:
        return {"weight": weight}
    quantized = encode_weight(weight, BITS, 64, make_input_scales(K))
    return {**quantized.tensors(), "weight": decode_weight(quantized)}


def deliver(layer: Any, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if name != "weight" or len(tensors) == 1:
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor)


def rows_of_rank(weight: torch.Tensor, tp_rank: int) -> torch.Tensor:
    own, shared, last = weight.split([128, 32, 32])
    return torch.cat([own.chunk(TP)[tp_rank], shared, last.chunk(TP)[tp_rank]])


@pytest.mark.parametrize("tp_rank", range(TP))
@pytest.mark.parametrize("packed", [True, False])
def test_packed_rows_follow_those_of_the_weight(packed: bool, tp_rank: int, rank: Rank) -> None:
    rank(tp_rank, TP)
    layer = make_layer(tp_rank)
    first, second = make_tensors(packed, 0), make_tensors(packed, 1)
    deliver(layer, first)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.eye(K)
    expected = rows_of_rank(first["weight"], tp_rank).T
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected, rtol=0, atol=1e-4)

    initialize_layerwise_reload(layer)
    deliver(layer, second)
    finalize_layerwise_reload(  # type: ignore[no-untyped-call]  # vLLM does not annotate it
        layer, SimpleNamespace(dtype=torch.float32)
    )
    expected = rows_of_rank(second["weight"], tp_rank).T
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected, rtol=0, atol=1e-4)


def test_the_default_device_does_not_matter(rank: Rank) -> None:
    """Loaders of vLLM deliver to other devices than the default one."""
    rank(0, TP)
    layer, tensors = make_layer(0), make_tensors(packed=True)
    with torch.device("meta"):
        deliver(layer, tensors)
    assert torch.equal(layer.row_norms, rows_of_rank(tensors["row_norms"], 0))


@pytest.mark.parametrize("tp_rank", range(TP))
def test_rows_quantized_while_loading_are_those_of_the_weight(tp_rank: int, rank: Rank) -> None:
    rank(tp_rank, TP)
    layer = make_layer(tp_rank, QamwConfig(plan=OnlinePlan(BITS / 2), backend="decode"))
    layer.quant_method.start(layer)
    weight = make_tensors(packed=False)["weight"]
    deliver(layer, {"weight": weight})
    block = layer.quant_method.rotation_block_size
    decoded = decode_weight(encode_weight(weight, BITS, block, make_input_scales(K)))
    expected = rows_of_rank(decoded, tp_rank).T
    found = layer.quant_method.apply(layer, torch.eye(K))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_loader_that_does_more_than_to_choose_rows_is_refused(rank: Rank) -> None:
    rank(0, TP)
    layer = make_layer(0)
    layer.weight.weight_loader = lambda param, loaded: param.data.copy_(-loaded[: len(param)])
    layer.quant_method.take_loader()
    message = r"in_proj: vLLM's model class does not load whole rows .* rank 0, .*'\*\.in_proj'"
    with pytest.raises(TensorError, match=message):
        deliver(layer, make_tensors(packed=True))
