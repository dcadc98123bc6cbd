"""What a layer holds: after loading, after a second processing, after a reload; and its summary."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.layers.utils import _get_lora_device as lora_device_of
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    get_and_maybe_dequant_weights,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from qamw_vllm.backend import Backend
from qamw_vllm.config import QamwConfig
from qamw_vllm.online.plan import OnlinePlan
from qamw_vllm.state import LayerState, state_of
from tests.vllm_.layers import (
    BITS,
    K,
    Tensors,
    deliver,
    load,
    make_checkpoint,
    make_config,
    make_layer,
    needs_cpu,
)

pytestmark = needs_cpu

Rank = Callable[[int, int], None]


@pytest.mark.parametrize("backend", ["decode", "triton"])
@pytest.mark.parametrize("online", [False, True], ids=["quantized", "online"])
def test_layers_are_reloaded(online: bool, backend: Backend, rank: Rank) -> None:
    """As vLLM's reload does it: the layer gets its first parameters back, and new tensors."""
    config = make_config(backend)
    if online:
        config = QamwConfig(plan=OnlinePlan(BITS / 2), backend=backend)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))

    def hand_over(layer: Any, matrices: list[Tensors]) -> None:
        if online:
            layer.weight.weight_loader(layer.weight, matrices[0]["weight"])
        else:
            deliver(layer, "o_proj", matrices)

    def load_and_process(matrices: list[Tensors]) -> Any:
        layer = make_layer("o_proj", config)
        assert state_of(layer) is LayerState.LOADING
        hand_over(layer, matrices)
        layer.quant_method.process_weights_after_loading(layer)
        assert state_of(layer) is LayerState.READY
        return layer

    first, second = (make_checkpoint("o_proj", seed=seed) for seed in (0, 1))
    layer, other = load_and_process(first), load_and_process(second)
    expected = other.quant_method.apply(other, x)
    assert not torch.equal(layer.quant_method.apply(layer, x), expected)
    places = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}

    initialize_layerwise_reload(layer)
    hand_over(layer, second)
    finalize_layerwise_reload(  # type: ignore[no-untyped-call]  # vLLM does not annotate it
        layer, SimpleNamespace(dtype=torch.float32)
    )
    assert state_of(layer) is LayerState.READY
    assert torch.equal(layer.quant_method.apply(layer, x), expected)
    # CUDA graphs go on reading the same memory.
    assert {name: t.data_ptr() for name, t in layer.state_dict().items()} == places


def test_what_vllm_asks_of_a_layer_for_lora_and_latent_attention(rank: Rank) -> None:
    layer = make_layer("fc", make_config("triton"))
    matrices = make_checkpoint("fc")
    load(layer, "fc", matrices)
    assert not hasattr(layer, "weight")
    assert lora_device_of(layer) == torch.device("cpu")
    layer.input_size_per_partition = K
    weight = get_and_maybe_dequant_weights(layer, torch.float32)
    torch.testing.assert_close(weight, matrices[0]["weight"], rtol=1e-4, atol=1e-4)


def test_offloading_finds_the_tiles_by_the_name_of_the_planes(rank: Rank) -> None:
    """vLLM moves a parameter back to the CPU by its name, and exchanges its data."""
    layer = make_layer("fc", make_config("triton"))
    moved = {name for name, _ in layer.named_parameters()}
    load(layer, "fc", make_checkpoint("fc"))
    found = {name: p for name, p in layer.named_parameters() if name in moved}
    assert found["qweight"] is layer.tiles
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    expected = layer.quant_method.apply(layer, x)
    found["qweight"].data = torch.zeros_like(layer.tiles)
    assert not torch.equal(layer.quant_method.apply(layer, x), expected)


def test_one_line_describes_what_was_loaded(rank: Rank, log_lines: list[str]) -> None:
    config = make_config()
    layers = [make_layer(kind, config) for kind in ("qkv_proj", "o_proj")]
    for layer, kind in zip(layers, ("qkv_proj", "o_proj"), strict=True):
        assert not log_lines
        load(layer, kind, make_checkpoint(kind))
    # 512 + 256 rows of 256 inputs, 11 bits for a pair; a norm of 4 bytes per row, a scale of 2
    # bytes per input and layer
    num_bytes = 768 * 256 // 2 * 11 / 8 + 4 * 768 + 2 * 2 * 256
    bits_per_weight = 8 * num_bytes / (768 * 256)
    assert (
        f"2 layers, 0.2 M weights of {bits_per_weight:.2f} bits: 0.1 MB, instead of 0.4 MB in "
        "16 bits"
    ) in log_lines[0]
    assert "because this is a CPU" in log_lines[0]
    assert len(log_lines) == 1
