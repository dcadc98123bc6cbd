"""What of a plain checkpoint is quantized."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)

from qamw_kernels.errors import FormatError
from qamw_vllm.config import QamwConfig
from qamw_vllm.online.plan import OnlinePlan
from tests.vllm_.layers import K, needs_cpu


def test_vision_and_audio_are_left_out() -> None:
    covers, layer = OnlinePlan().covers, SimpleNamespace(input_size=64)
    assert covers(layer, "model.layers.3.mlp.down_proj")
    assert covers(layer, "language_model.model.layers.3.mlp.down_proj")
    for prefix in (
        "vision_tower.encoder.layers.0.mlp.fc1",
        "visual.layers.0.fc1",
        "audio_tower.layers.0.fc1",
        "lm_head",
        "mlp.fc1",
    ):
        assert not covers(layer, prefix)
    assert not covers(SimpleNamespace(input_size=96), "model.layers.3.mlp.down_proj")


def test_rates_of_no_codebook_are_refused() -> None:
    message = (
        r"bits_per_weight must be 3, 3\.5 \.\.\. 6 when a model is quantized while loading, "
        r"got 4\.7"
    )
    with pytest.raises(FormatError, match=message):
        QamwConfig.from_config({"quant_method": "qamw", "bits_per_weight": 4.7})


@needs_cpu
@pytest.mark.usefixtures("rank")
def test_routers_and_vision_are_plain_layers() -> None:
    config = QamwConfig()  # as vLLM makes it for a plain checkpoint
    router = ReplicatedLinear(K, 8, quant_config=config, prefix="model.layers.0.mlp.gate")
    vision = ColumnParallelLinear(K, 64, quant_config=config, prefix="model.vision.proj")
    for layer in (router, vision):
        assert type(layer.quant_method) is UnquantizedLinearMethod
