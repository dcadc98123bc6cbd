"""What of a plain model is quantized while it is loaded."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.offloader import BaseOffloader

from qamw_kernels.errors import FormatError
from qamw_vllm.config import QamwConfig
from qamw_vllm.online.coverage import choose_layers
from qamw_vllm.online.experts import QamwOnlineMoEMethod
from qamw_vllm.online.linear import QamwOnlineLinearMethod
from tests.vllm_.layers import K, make_config, needs_cpu


def test_rates_of_no_codebook_are_refused() -> None:
    message = (
        r"bits_per_weight must be 3, 3\.5 \.\.\. 6 when a model is quantized while loading, "
        r"got 4\.7"
    )
    with pytest.raises(FormatError, match=message):
        QamwConfig.from_config({"quant_method": "qamw", "bits_per_weight": 4.7})


def block(config: QamwConfig | None, inputs: int = K) -> nn.Module:
    """A layer of a model: two linears, whose names do not tell what they are."""
    module = nn.Module()
    module.a = ColumnParallelLinear(inputs, 512, quant_config=config)
    module.b = RowParallelLinear(512, inputs, quant_config=config)
    return module


def experts() -> Any:
    layer = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(
        intermediate_size_per_partition=512,
        moe_parallel_config=SimpleNamespace(tp_size=1),
        hidden_dim=K,
        is_act_and_mul=True,
    )
    layer.global_num_experts = 4
    layer.quant_method = QamwOnlineMoEMethod.__new__(QamwOnlineMoEMethod)
    return layer


def quantized(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), QamwOnlineLinearMethod)
    }


pytestmark = [needs_cpu, pytest.mark.usefixtures("rank")]


def test_repeated_layers_are_found_whatever_their_names_are() -> None:
    config = QamwConfig()  # as vLLM makes it for a plain checkpoint
    model = nn.Module()
    model.something = nn.ModuleList([block(config), block(config)])
    model.outside = ColumnParallelLinear(K, 64, quant_config=config, prefix="model.layers.0.x")
    model.smaller = nn.ModuleList([block(config)])
    choose_layers(model)
    assert quantized(model) == {
        *("something.0.a", "something.0.b", "something.1.a", "something.1.b"),
    }
    for layer in (model.outside, model.smaller[0].a):
        assert type(layer.quant_method) is UnquantizedLinearMethod
        assert layer.weight.device.type == "cpu" and layer.weight.shape[1] == K
        layer.weight.weight_loader(layer.weight, torch.ones_like(layer.weight))
        assert (layer.weight == 1).all()
    assert model.something[0].a.weight.is_meta


def test_offloading_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would copy weights that are not there yet, and end with what it makes of that."""

    class Offloader(BaseOffloader):
        def wrap_modules(self, modules_generator: Any) -> list[nn.Module]:
            raise AssertionError

    monkeypatch.setattr("vllm.model_executor.offloader.base._instance", Offloader())
    with pytest.raises(FormatError, match=r"Offloader: weights .* run qamw quantize first"):
        block(QamwConfig())
    block(make_config())


def test_deepseek_does_not_ask_for_the_plain_weight() -> None:
    """Its class has a product of its own for some sizes, which it chooses when a layer is made."""
    config, model = QamwConfig(), nn.Module()
    model.blocks = nn.ModuleList([block(config)])
    model.blocks[0].a._use_min_latency_gemm = True
    choose_layers(model)
    assert model.blocks[0].a._use_min_latency_gemm is False


def test_what_is_multiplied_by_groups_is_plain() -> None:
    """As in checkpoints; DeepSeek-V4's class reads the plain weight."""
    config, model = QamwConfig(), nn.Module()
    model.blocks = nn.ModuleList([block(config)])
    model.blocks[0].b.is_bmm = True
    choose_layers(model)
    assert quantized(model) == {"blocks.0.a"}


def test_other_modalities_are_left_out() -> None:
    config, model = QamwConfig(), nn.Module()
    model.tower = nn.ModuleList([block(config) for _ in range(3)])
    model.language = nn.Module()
    model.language.h = nn.ModuleList([block(config)])
    model.supports_multimodal = True
    model.get_language_model = lambda: model.language
    choose_layers(model)
    assert quantized(model) == {"language.h.0.a", "language.h.0.b"}


def test_routers_and_gates_are_plain_and_other_replicated_layers_are_not() -> None:
    config, model = QamwConfig(), nn.Module()
    layer = block(config)
    layer.down = ReplicatedLinear(K, 64, quant_config=config)  # of latent attention, for example
    layer.mlp = nn.Module()
    layer.mlp.router = nn.Module()
    layer.mlp.router.gate = ReplicatedLinear(K, 4, quant_config=config)
    layer.mlp.shared_gate = ReplicatedLinear(K, 1, quant_config=config)
    layer.mlp.shared = block(config)
    layer.mlp.experts = nn.Module()
    layer.mlp.experts.routed_experts = experts()
    model.blocks = nn.ModuleList([layer])
    choose_layers(model)
    names = {"a", "b", "down", "mlp.shared.a", "mlp.shared.b"}
    assert quantized(model) == {f"blocks.0.{name}" for name in names}


def test_routers_of_vllm_are_plain_at_once() -> None:
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    router = GateLinear(K, 4, quant_config=QamwConfig(), prefix="model.layers.0.mlp.router.gate")
    assert type(router.quant_method) is UnquantizedLinearMethod
    assert not router.weight.is_meta


def test_what_cannot_pay_is_listed(log_lines: list[str]) -> None:
    config, model = QamwConfig(), nn.Module()
    model.blocks = nn.ModuleList([block(config)])
    model.blocks[0].small = ReplicatedLinear(48, 64, quant_config=config)
    choose_layers(model)
    (line,) = log_lines
    assert "1.2 % of the linear weights of the layers stay as they are: blocks.0.small" in line


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("hidden", "inner"), [(96, 128), (128, 96)])
def test_experts_that_the_format_cannot_pack_are_plain(
    hidden: int, inner: int, log_lines: list[str]
) -> None:
    config, model = QamwConfig(), nn.Module()
    layer = block(config)
    layer.mlp = nn.Module()
    layer.mlp.experts = FusedMoEFactory(
        4, 2, hidden, inner, quant_config=config, prefix="blocks.0.mlp.experts"
    )
    method = layer.mlp.experts.routed_experts.quant_method
    assert type(method) is UnquantizedFusedMoEMethod
    model.blocks = nn.ModuleList([layer])
    choose_layers(model)
    assert quantized(model) == {"blocks.0.a", "blocks.0.b"}
    (line,) = log_lines
    share = 1 / (1 + 2 * K * 512 / (4 * 3 * hidden * inner))
    assert f"{100 * share:.1f} % of the linear weights" in line
    assert "stay as they are: blocks.0.mlp.experts.routed_experts" in line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda config: [block(None)], "only 0% .* without a quantization config.*: blocks.0.a"),
        (lambda config: [block(config), block(None), block(None)], "only 33% .*blocks.1.a"),
        (lambda config: [], "only 0% .* no repeated layers"),
    ],
)
def test_models_of_which_little_would_be_quantized_are_refused(
    make: Callable[[QamwConfig], list[nn.Module]], message: str
) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(make(QamwConfig()))
    with pytest.raises(FormatError, match=message):
        choose_layers(model)
    choose_layers(model, is_draft=True)  # it may be small


def test_layers_that_nobody_has_chosen_are_refused() -> None:
    layer = block(QamwConfig()).a
    with pytest.raises(FormatError, match="its loader cannot quantize while loading"):
        layer.quant_method.process_weights_after_loading(layer)
