"""vLLM's load formats, among them random weights: layers as its loaders treat them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader

from qamw_kernels.errors import FormatError
from qamw_vllm.backend import Backend
from qamw_vllm.config import QamwConfig
from tests.vllm_.layers import PARTS, ROWS, K, make_config, make_layer, needs_cpu
from tests.vllm_.test_loading_experts import make_experts

pytestmark = [needs_cpu, pytest.mark.usefixtures("rank")]

UNIFORM = 1e-3 / 3**0.5  # the deviation of vLLM's dummy weights


@contextmanager
def engine(load_format: str) -> Iterator[None]:
    """What vLLM's layers see of an engine that loads in this format."""
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format=load_format))):
        yield


@pytest.mark.parametrize("backend", ["decode", "triton"])
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("kind", ["qkv_proj", "o_proj"])
def test_random_weights(kind: str, online: bool, backend: Backend) -> None:
    """They are about as large as those that vLLM gives to plain layers, whatever memory held."""
    config = QamwConfig(backend=backend) if online else make_config(backend)
    config.packed_modules_mapping = PARTS
    with engine("dummy"):
        layer = make_layer(kind, config, bias=True)
        for tensor in layer.parameters():
            if tensor.is_floating_point() and tensor.device.type == "cpu":
                tensor.data.fill_(torch.nan)
        get_model_loader(LoadConfig(load_format="dummy")).load_weights(layer, None)  # type: ignore[arg-type]
        layer.quant_method.process_weights_after_loading(layer)
    layer.bias = None
    weight = layer.quant_method.apply(layer, torch.eye(K)).T
    assert weight.shape == (sum(ROWS[kind]), K)
    assert UNIFORM / 2 < weight.std() < 2 * UNIFORM


def test_random_experts() -> None:
    with engine("dummy"):
        layer, loader = make_experts()
    layer.w2_row_norms.data.fill_(torch.nan)
    loader.check_loaded()
    assert (layer.w13_row_norms == layer.w2_row_norms[0, 0]).all()
    assert (layer.w13_input_scales == 1).all() and (layer.w2_input_scales == 1).all()
    assert len(layer.w13_qweight.unique()) > 1000


@pytest.mark.parametrize("config", [make_config(), QamwConfig()])
def test_formats_that_store_layers_are_refused(config: QamwConfig) -> None:
    message = r"load_format='sharded_state': qamw loads checkpoints, not layers"
    with engine("sharded_state"), pytest.raises(FormatError, match=message):
        make_layer("o_proj", config)


@pytest.mark.parametrize("verify", ["0", "1"])
def test_formats_of_other_loaders_are_refused(verify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not checkpoints are verified: they would leave rows in the wrong order, too."""
    message = r"load_format='runai_streamer': its loader does not support .* one of auto, .*dummy"
    monkeypatch.setenv("QAMW_VERIFY", verify)
    with engine("runai_streamer"), pytest.raises(FormatError, match=message):
        make_layer("o_proj", make_config())
