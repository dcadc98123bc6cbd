"""A quantised head: offline, and what vLLM's layer takes in of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.checkpoints import decoded, tensors_of
from tests.helpers.models import tiny_model
from offline_quantize.errors import QuantizeError
from offline_quantize.checkpoints.verify import inspect, verify
from offline_quantize.planning.plan import make_plan
from offline_quantize.pipeline import quantize


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_head(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untied, or tied to the embeddings, from which it parts; with calibration, by what the last norm puts out."""
    from offline_quantize.calibration import hessians as cal
    from offline_quantize.evaluation.run import Head, load_model

    monkeypatch.setattr(cal, "WINDOW_TOKENS", 128)
    model, out = tiny_model(tmp_path / "model", architecture), tmp_path / "out"
    before = tensors_of(model)
    reports = [quantize(model, out, quantize_lm_head=True, calibration_tokens=512),
               quantize(model, tmp_path / "nearest", encoder="nearest", rates="uniform", quantize_lm_head=True, calibration_tokens=512)]
    head, nearest = (next(entry for entry in report["layers"] if entry["name"] == "lm_head") for report in reports)
    assert head["index_bits"] == 12 and head["nmse"] < 0.001 and head["output_nmse"] < nearest["output_nmse"]
    assert "The head has 6 bits per weight" in (out / "README.md").read_text()
    assert [reports[1][key] for key in ("calibration_tokens", "encoder", "rates")] == [512, "nearest", "uniform"]
    assert verify(out) and "lm_head" in inspect(out)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "lm_head" not in config["quantization_config"]["ignore"]
    assert torch.equal(tensors_of(out)["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    original = before["lm_head.weight" if architecture == "llama" else "model.embed_tokens.weight"].float()
    weight = decoded(out, "lm_head")
    assert float((weight - original).square().sum() / original.square().sum()) == pytest.approx(head["nmse"], rel=1e-3)
    states = torch.randn(3, weight.shape[1])
    logits = load_model(out).lm_head(states)
    torch.testing.assert_close(logits, states @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Head(out, torch.device("cpu")).logits(states), logits, rtol=1e-4, atol=1e-4)

    # The Hessian is that of the whole model's last states.
    plan, tokens = make_plan(model), cal.calibration_windows(model, cal.DEFAULT_TEXT, 512)
    monkeypatch.setattr(cal, "DTYPE", torch.float32)
    calibrator = cal.Calibrator(plan.checkpoint, tokens, torch.device("cpu"))
    for layer in range(2):
        calibrator.finish(dict(plan.checkpoint.load(plan.layer_tensor_names(layer))))
    with torch.no_grad():
        last = load_model(model).base_model(tokens).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(calibrator.head_hessian(), last.T @ last / len(last), rtol=1e-3, atol=1e-3)


def test_head_that_vllm_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"--quantize-lm-head: vLLM's gemma2 has no head"):
        make_plan(tiny_model(tmp_path / "model", "gemma2"), quantize_lm_head=True)


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_without_a_word_are_zero(dim: int) -> None:
    """Whatever was in memory before: vLLM's reload hands over parameters that nobody has filled."""
    pytest.importorskip("vllm")
    from qamw_vllm.head import _rows_loader

    layer = SimpleNamespace(shard_indices=SimpleNamespace(org_vocab_start_index=4, org_vocab_end_index=7))
    param = torch.nn.Parameter(torch.full((2, 5), torch.nan) if dim else torch.full((5,), torch.nan), requires_grad=False)
    loaded = torch.arange(20.0).view(2, 10) if dim else torch.arange(10.0)
    _rows_loader(layer, dim)(param, loaded)
    assert param.data.view(-1, 5).tolist() == [[4, 5, 6, 0, 0], [14, 15, 16, 0, 0]][: 1 + dim]
