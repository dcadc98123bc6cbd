"""vLLM's view of a checkpoint's configuration: which layers are quantized, and how."""

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.models.utils import WeightsMapper

from qamw_kernels.errors import FormatError
from qamw_kernels.format.config import QamwFormat
from qamw_vllm.config import QamwConfig
from tests.vllm_.layers import BITS, PARTS, K, make_config, needs_cpu

LAYER = "model.layers.0."


def test_config_survives_pickling() -> None:
    config = make_config(layer_index_bits={"model.layers.0.o_proj": 8})
    again = pickle.loads(pickle.dumps(config))
    assert again.format == config.format
    assert again.packed_modules_mapping == PARTS
    assert again.index_bits_of("model.layers.0.o_proj") == 8


def test_config_of_a_plain_checkpoint_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(QamwConfig()))  # as vLLM makes it for a plain checkpoint
    assert again.online_plan.index_bits == BITS


def test_config_contract() -> None:
    config = make_config()
    assert config.get_name() == "qamw"
    assert config.get_config_filenames() == []
    assert config.get_min_capability() == 80
    assert config.get_supported_act_dtypes() == [torch.bfloat16, torch.float16, torch.float32]
    assert QamwConfig.override_quantization_method({"quant_method": "awq"}, None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version 3 is not supported"),
        (
            {"codebooks": {"circular-gaussian-2048-v1": "0" * 64}},
            "codebooks: this version of qamw ships",
        ),
        ({"format_version": ...}, r"expected a format_version, .* got \['codebooks', 'ignore'"),
        ({"group_size": 128}, r"unknown keys \['group_size'\]"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        changed = QamwFormat(BITS, {K: 64}).to_dict() | change
        QamwConfig.from_config({key: x for key, x in changed.items() if x is not ...})


@needs_cpu
def test_skip_rule_is_exact(rank: Callable[[int, int], None]) -> None:
    config = make_config(ignore=("lm_head", "model.layers.1.o_proj"))
    assert config.index_bits_of("model.layers.1.o_proj") is None
    assert config.index_bits_of("model.layers.11.o_proj") == BITS
    assert config.index_bits_of("other.model.layers.1.o_proj") == BITS
    plain = RowParallelLinear(K, K, bias=False, quant_config=config, prefix="model.layers.1.o_proj")
    assert type(plain.quant_method) is UnquantizedLinearMethod
    assert plain.weight.shape == (K, K)
    assert config.get_quant_method(torch.nn.Linear(4, 4), "model.layers.0.o_proj") is None


def test_fused_layers_follow_their_parts() -> None:
    config = make_config(
        ignore=tuple(LAYER + part for part in PARTS["qkv_proj"]),
        layer_index_bits={LAYER + "gate_proj": 8, LAYER + "up_proj": 8},
    )
    assert config.index_bits_of(LAYER + "qkv_proj") is None
    assert config.index_bits_of(LAYER + "gate_up_proj") == 8
    parts = (LAYER + "q_proj", LAYER + "k_proj", LAYER + "v_proj")
    assert config.parts_of(LAYER + "qkv_proj") == parts


@pytest.mark.parametrize(
    "change",
    [
        {"ignore": ("model.layers.0.q_proj",)},
        {"layer_index_bits": {"model.layers.0.v_proj": 8}},
    ],
)
def test_mixed_fused_layers_are_refused(change: dict[str, Any]) -> None:
    message = r"model.layers.0.qkv_proj: vLLM fuses .*q_proj: .*k_proj: 11 index bits.*v_proj: "
    with pytest.raises(FormatError, match=message):
        make_config(**change).index_bits_of("model.layers.0.qkv_proj")


def test_model_prefixes_are_mapped() -> None:
    config = make_config(
        ignore=("lm_head", "model.visual.fc"),
        layer_index_bits={"model.language_model.layers.0.o_proj": 8},
    )
    prefixes = {
        "model.visual.": "visual.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    assert config.index_bits_of("visual.fc") is None
    assert config.index_bits_of("language_model.lm_head") is None
    assert config.index_bits_of("language_model.model.layers.0.o_proj") == 8


def test_experts_are_ignored_together() -> None:
    prefix = "model.layers.0.mlp.experts"
    layer = torch.nn.Module.__new__(RoutedExperts)  # of which only the class and this matter
    layer.moe_config = SimpleNamespace(is_act_and_mul=True)
    names = [f"{prefix}.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    config = QamwConfig(QamwFormat(BITS, {}, ignore=tuple(names)))
    assert config.get_quant_method(layer, prefix) is None
    config = QamwConfig(QamwFormat(BITS, {}, ignore=tuple(names[1:])))
    message = r"together, but config.json ignores only up_proj, down_proj"
    with pytest.raises(FormatError, match=message):
        config.get_quant_method(layer, prefix)
    layer.moe_config.is_act_and_mul = False  # Nemotron-H has no gate
    assert config.get_quant_method(layer, prefix) is None
