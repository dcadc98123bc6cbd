"""Checkpoints whose tensors are not those of their architecture are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.errors import QuantizeError
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.errors import QamwError
from tests.architectures.build import build
from tests.helpers.checkpoints import change_tensor
from tests.helpers.models import copy_model, tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (DOWN, lambda t: None, f"no tensor {DOWN}"),
        ("model.norm.weight", lambda t: None, "no tensor model.norm.weight"),
        (DOWN, lambda t: torch.zeros(256, 448), rf"{DOWN} has shape \[256, 448\]"),
        (DOWN, lambda t: torch.zeros(256, 512, dtype=torch.int8), f"{DOWN} is torch.int8"),
    ],
)
def test_wrong_tensors_are_refused(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    message: str,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    model, out = copy_model(tiny_llama, tmp_path / "model"), tmp_path / "out"
    change_tensor(model, name, change)
    with pytest.raises(QamwError, match=message):
        quantize(model, out, QuantizeRequest(calibration=None))
    assert not out.exists()


def test_a_head_that_only_transformers_uses_is_refused(tmp_path: Path) -> None:
    """vLLM makes logits with the embeddings; a copy of them does no harm."""
    model = tiny_model(tmp_path / "model", "gemma2")
    file = model / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    make_plan(model)
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    with pytest.raises(QuantizeError, match=r"lm_head.weight differs from .*Gemma2ForCausalLM"):
        make_plan(model)


def test_a_model_without_logits_has_no_head_to_quantize(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "qwen3_base")
    assert make_plan(model).head is None
    with pytest.raises(QuantizeError, match="quantize_lm_head=True: Qwen3Model makes no logits"):
        make_plan(model, QuantizeRequest(quantize_lm_head=True))


def test_a_model_of_which_nothing_can_be_quantized(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 24}
    model = tiny_model(tmp_path / "model", "llama", **sizes)
    with pytest.raises(
        QuantizeError, match=r"no matrix of the decoder can be quantized:\n.*96 inputs"
    ):
        make_plan(model, QuantizeRequest(allow_partial=True))
