"""What arrives decides the form of a layer, whatever config.json says under vLLM's names."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.errors import TensorError
from qamw_kernels.format.config import QamwFormat
from qamw_kernels.format.packing import packed_shape
from qamw_vllm.backend import Backend
from qamw_vllm.loading.names import NameCheck, unserved_layers
from qamw_vllm.loading.reading import READING
from tests.vllm_.layers import (
    BITS,
    ROWS,
    SHARD_IDS,
    K,
    Tensors,
    deliver,
    load,
    make_checkpoint,
    make_config,
    make_layer,
    needs_cpu,
)
from tests.vllm_.test_linear import part_of_rank

pytestmark = needs_cpu

Rank = Callable[[int, int], None]
OTHER = 8


def matrices_of(kind: str, index_bits: int | None, seed: int = 0) -> list[Tensors]:
    """As make_checkpoint; None for matrices that are not quantized."""
    generator = torch.Generator().manual_seed(seed)
    matrices = []
    for rows in ROWS[kind]:
        weight = torch.randn(rows, K, generator=generator)
        if index_bits is None:
            matrices.append({"weight": weight})
        else:
            quantized = encode_weight(weight, index_bits, 64, make_input_scales(K))
            matrices.append({**quantized.tensors(), "weight": decode_weight(quantized)})
    return matrices


def deliver_plain(layer: Any, kind: str, matrices: list[Tensors]) -> None:
    """Deliver weights to the parameter that the layer had before anything was loaded."""
    parameter = dict(layer.named_parameters())["weight"]
    for position, tensors in enumerate(matrices):
        shard = [SHARD_IDS[kind][position]] if kind in SHARD_IDS else []
        parameter.weight_loader(parameter, tensors["weight"], *shard)


@pytest.mark.parametrize("backend", ["decode", "triton"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("index_bits", [OTHER, None], ids=["another rate", "plain"])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj", "o_proj", "fc"])
def test_a_layer_takes_the_form_of_what_arrives(
    kind: str, index_bits: int | None, tp_size: int, backend: Backend, rank: Rank
) -> None:
    matrices = matrices_of(kind, index_bits)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    expected = [x @ matrix["weight"].T for matrix in matrices]
    outputs = []
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = make_layer(kind, make_config(backend))
        if index_bits is None:
            deliver_plain(layer, kind, matrices)
        else:
            deliver(layer, kind, matrices)
        layer.quant_method.process_weights_after_loading(layer)
        if index_bits is None:
            assert type(layer.quant_method) is UnquantizedLinearMethod
        if index_bits is None or backend == "decode":
            assert set(dict(layer.named_parameters())) == {"weight"}
        local = x.chunk(tp_size, 1)[tp_rank].contiguous() if kind == "o_proj" else x
        outputs.append(layer.quant_method.apply(layer, local))
        if kind != "o_proj":
            part = part_of_rank(kind, expected, tp_rank, tp_size)
            torch.testing.assert_close(outputs[-1], part, rtol=1e-4, atol=1e-4)
    if kind == "o_proj":
        total = torch.stack(outputs).sum(0)
        torch.testing.assert_close(total, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["decode", "triton"])
@pytest.mark.parametrize("index_bits", [OTHER, None], ids=["another rate", "plain"])
def test_a_layer_of_another_form_is_reloaded(
    index_bits: int | None, backend: Backend, rank: Rank
) -> None:
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))

    def hand_over(layer: Any, matrices: list[Tensors]) -> None:
        if index_bits is None:
            deliver_plain(layer, "o_proj", matrices)
        else:
            deliver(layer, "o_proj", matrices)

    first, second = (matrices_of("o_proj", index_bits, seed) for seed in (0, 1))
    layer = make_layer("o_proj", make_config(backend))
    hand_over(layer, first)
    layer.quant_method.process_weights_after_loading(layer)
    initialize_layerwise_reload(layer)
    hand_over(layer, second)
    finalize_layerwise_reload(  # type: ignore[no-untyped-call]  # vLLM does not annotate it
        layer, SimpleNamespace(dtype=torch.float32)
    )
    output = layer.quant_method.apply(layer, x)
    torch.testing.assert_close(output, x @ second[0]["weight"].T, rtol=1e-4, atol=1e-4)


def test_inputs_without_a_block_size_are_expected_to_be_plain(rank: Rank) -> None:
    layer = make_layer("fc", make_config(rotation_block_sizes={512: 64}))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    assert shapes.pop("weight") == (192, K)
    assert all(0 in shape for shape in shapes.values())
    matrices = matrices_of("fc", None)
    deliver_plain(layer, "fc", matrices)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.ones(1, K)
    torch.testing.assert_close(
        layer.quant_method.apply(layer, x), x @ matrices[0]["weight"].T, rtol=1e-4, atol=1e-4
    )


def test_only_one_form_takes_memory(rank: Rank) -> None:
    layer = make_layer("qkv_proj", make_config())
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    assert shapes["qweight"] == packed_shape(512, K, BITS)
    assert shapes["weight"] == (0, 0)
    deliver(layer, "qkv_proj", matrices_of("qkv_proj", OTHER))
    assert layer.qweight.shape == packed_shape(512, K, OTHER)


@pytest.mark.parametrize("plain_first", [False, True])
def test_parts_of_different_forms_are_refused(plain_first: bool, rank: Rank) -> None:
    quantized, plain = matrices_of("gate_up_proj", BITS), matrices_of("gate_up_proj", None)
    layer = make_layer("gate_up_proj", make_config())
    parameters = dict(layer.named_parameters())

    def load_one(name: str, matrices: list[Tensors], shard: int) -> None:
        parameters[name].weight_loader(parameters[name], matrices[shard][name], shard)

    steps = [lambda: load_one("weight", plain, 0), lambda: load_one("row_norms", quantized, 1)]
    for step in steps[:1] if plain_first else steps[1:]:
        step()
    message = r"gate_proj / .*up_proj: vLLM fuses .*: (not )?quantized, .*: (not )?quantized"
    with pytest.raises(TensorError, match=message):
        (steps[1] if plain_first else steps[0])()


def test_missing_weights_of_a_plain_layer_are_named(rank: Rank) -> None:
    layer = make_layer("gate_up_proj", make_config())
    parameter = dict(layer.named_parameters())["weight"]
    parameter.weight_loader(parameter, torch.ones(512, K), 1)
    with pytest.raises(TensorError, match=r"lacks model.layers.0.gate_proj.weight$"):
        layer.quant_method.process_weights_after_loading(layer)


def test_another_rate_is_not_reloaded(rank: Rank) -> None:
    layer = make_layer("o_proj", make_config())
    load(layer, "o_proj", make_checkpoint("o_proj"))
    initialize_layerwise_reload(layer)
    message = r"or loads them again, so .* 11 index bits, .*: 8 index bits"
    with pytest.raises(TensorError, match=message):
        deliver(layer, "o_proj", matrices_of("o_proj", OTHER))


def test_tensors_are_as_config_json_says_of_their_names() -> None:
    format = QamwFormat(BITS, {K: 64}, {"model.layers.0.experts.*.w1": 8}, ("model.layers.0.gate",))
    check = NameCheck(format).check
    planes = {bits: torch.empty(packed_shape(8, K, bits)) for bits in (8, BITS)}
    check("model.layers.0.o_proj.qweight", planes[BITS])
    check("model.layers.0.experts.3.w1.qweight", planes[8])
    check("model.layers.0.gate.weight", torch.ones(8, K))
    for name, tensor, message in (
        ("model.layers.0.o_proj.qweight", planes[8], "expected 11 index bits, as config.json says"),
        ("model.layers.0.gate.qweight", planes[BITS], "says that model.layers.0.gate is not quant"),
        ("model.layers.0.experts.3.w1.weight", torch.ones(8, K), "w1 is quantized"),
    ):
        with pytest.raises(TensorError, match=message):
            check(name, tensor)


def test_input_scales_that_vllm_reorders_are_refused(rank: Rank) -> None:
    (tensors,) = make_checkpoint("o_proj")
    scales = torch.arange(1, K + 1).half()
    layer = make_layer("o_proj", make_config())
    load_scales = layer.input_scales.weight_loader
    try:
        READING.note("h.0.dense.input_scales", scales)
        load_scales(layer.input_scales, scales.clone())
        READING.note("h.1.dense.input_scales", 2 * scales)
        load_scales(layer.input_scales, scales)  # kept until others were read
        with pytest.raises(TensorError, match=r"h\.1\.dense\.input_scales: .* reorders it"):
            load_scales(layer.input_scales, scales.view(4, -1).T.reshape(-1))
    finally:
        READING.finish()
    load_scales(layer.input_scales, tensors["input_scales"])


def test_layers_without_a_config_are_found(rank: Rank) -> None:
    model = torch.nn.Module()
    model.mixer = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    for layer in model.mixer:
        layer.in_proj = torch.nn.Linear(4, 4)
        layer.out_proj = make_layer("fc", make_config())
    assert unserved_layers(model, "layers.1.mamba.in_proj") == ["mixer.1.in_proj"]
    assert unserved_layers(model, "layers.1.mamba.out_proj") == []
    error = "no parameter named 'mixer.0.in_proj.qweight'"
    assert unserved_layers(model, "other", error) == ["mixer.0.in_proj"]
