"""A model that is run layer by layer, against the whole model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.calibration.text import DEFAULT_TEXT, calibration_windows
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.runner import LayerRunner
from tests.helpers.models import tiny_model


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "phi3"])
def test_hidden_states_are_those_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    """Biases; layers of two kinds with masks of their own, a tied head and a scaled embedding;
    fused projections."""
    model = tiny_model(tmp_path / "model", architecture)
    checkpoint = Checkpoint(model)
    num_tokens = 6 * 128  # a whole batch and a part of one
    tokens = calibration_windows(model, DEFAULT_TEXT, num_tokens, window_tokens=128)
    runner = LayerRunner(checkpoint, tokens, torch.device("cpu"), torch.float32)
    layers = find_structure(checkpoint).layers
    assert len(layers) == 2
    for layer in layers:
        runner.load(layer, layer.load(checkpoint))
        runner.advance(layer.index)
        runner.unload(layer.index)
    whole = load_model(model)
    with torch.no_grad():
        expected = whole.base_model(input_ids=tokens).last_hidden_state
    normed = whole.base_model.norm(torch.cat(runner.hidden))
    torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bias_by_which_a_router_chooses_is_not_rounded(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_model(tmp_path / "model", "deepseek_v3")
    file, name = model / "model.safetensors", "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(file)
    tensors[name] = 5 + torch.rand(tensors[name].shape) / 100
    save_file(tensors, file, {"format": "pt"})
    checkpoint = Checkpoint(model)
    layer = find_structure(checkpoint).layers[1]
    runner = LayerRunner(checkpoint, torch.zeros(0, 8, dtype=int), torch.device("cpu"), dtype)
    runner.load(layer, layer.load(checkpoint))
    loaded = dict(runner.model.named_buffers())
    assert torch.equal(loaded[name], tensors[name])
