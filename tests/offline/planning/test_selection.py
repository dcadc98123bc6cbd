"""Checkpoints whose tensors are not those of their architecture are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offline_quantize.errors import QuantizeError
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.checkpoints import change_tensor
from tests.helpers.models import copy_model

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
    with pytest.raises(QuantizeError, match=message):
        quantize(model, out, QuantizeRequest(calibration=None))
    assert not out.exists()
