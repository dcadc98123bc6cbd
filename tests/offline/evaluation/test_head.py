"""Logits from last hidden states."""

from pathlib import Path

import pytest
import torch

from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.engines import load_model
from offline_quantize.evaluation.head import Head
from tests.helpers.checkpoints import change_tensor
from tests.helpers.models import copy_model, tiny_model


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_head_of_a_model_with_experts(architecture: str, tmp_path: Path) -> None:
    directory = tiny_model(tmp_path / "model", architecture)
    model, ids = load_model(directory), torch.arange(3, 40)[None]
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
        logits = model(ids).logits[0]
    head = Head(directory, torch.device("cpu"))
    torch.testing.assert_close(head.logits(hidden), logits)


def test_a_head_without_a_weight_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    change_tensor(model, "lm_head.weight", lambda weight: None)
    with pytest.raises(QuantizeError, match=r"no tensor lm_head.weight, which the logits need"):
        Head(model, torch.device("cpu"))
