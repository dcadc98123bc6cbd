"""A quantized head, from its Hessian to its logits."""

import json
from pathlib import Path

import pytest
import torch

from offline_quantize.calibration.hessians import Calibrator
from offline_quantize.calibration.text import DEFAULT_TEXT, calibration_windows
from offline_quantize.checkpoints.inspect import inspect
from offline_quantize.checkpoints.verify import verify
from offline_quantize.evaluation.engines import load_model
from offline_quantize.evaluation.head import Head
from offline_quantize.output.report import LayerReport, Report
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.checkpoints import change_tensor, decoded, tensors_of
from tests.helpers.models import tiny_model

CPU = torch.device("cpu")
WINDOW_TOKENS = 128


def head_of(report: Report) -> LayerReport:
    return next(layer for layer in report.layers if layer.name == "lm_head")


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_head(architecture: str, tmp_path: Path) -> None:
    """Untied, or tied to the embeddings, from which it parts."""
    model, out = tiny_model(tmp_path / "model", architecture), tmp_path / "out"
    before = tensors_of(model)
    options = {
        "quantize_lm_head": True,
        "calibration_tokens": 512,
        "window_tokens": WINDOW_TOKENS,
    }
    report = quantize(model, out, QuantizeRequest(**options))
    plain = QuantizeRequest(encoder="nearest", rates="uniform", **options)
    nearest = quantize(model, tmp_path / "nearest", plain)
    head = head_of(report)
    assert head.index_bits == 12 and head.nmse < 0.001
    assert head.output_nmse < head_of(nearest).output_nmse
    assert "In addition, the head has 6 bits per weight" in (out / "README.md").read_text()
    assert (nearest.calibration_tokens, nearest.encoder, nearest.rates) == (
        512,
        "nearest",
        "uniform",
    )
    assert verify(out) and "lm_head" in inspect(out)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" not in config["quantization_config"]["ignore"]
    embeddings = before["model.embed_tokens.weight"]
    assert torch.equal(tensors_of(out)["model.embed_tokens.weight"], embeddings)

    original = before["lm_head.weight"] if architecture == "llama" else embeddings
    original = original.float()
    weight = decoded(out, "lm_head")
    nmse = float((weight - original).square().sum() / original.square().sum())
    assert nmse == pytest.approx(head.nmse, rel=1e-3)
    states = torch.randn(3, weight.shape[1])
    logits = load_model(out).lm_head(states)
    torch.testing.assert_close(logits, states @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Head(out, CPU).logits(states), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma4_text", "gemma4"])
def test_hessian_is_that_of_the_last_states(architecture: str, tmp_path: Path) -> None:
    """By what the last norm of the whole model puts out."""
    model = tiny_model(tmp_path / "model", architecture)
    plan = make_plan(model)
    tokens = calibration_windows(model, DEFAULT_TEXT, 512, window_tokens=WINDOW_TOKENS)
    calibrator = Calibrator(plan.checkpoint, tokens, CPU, torch.float32)
    for layer in plan.layers:
        calibrator.finish(layer, layer.load(plan.checkpoint))
    with torch.no_grad():
        last = load_model(model).base_model(tokens).last_hidden_state.flatten(0, 1)
    expected = last.T @ last / len(last)
    torch.testing.assert_close(calibrator.head_hessian(), expected, rtol=1e-3, atol=1e-3)


def test_a_head_that_reads_zeros_has_no_hessian(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    change_tensor(model, "model.norm.weight", torch.zeros_like)
    request = QuantizeRequest(calibration_tokens=512, quantize_lm_head=True)
    assert head_of(quantize(model, tmp_path / "out", request)).nmse < 0.01
