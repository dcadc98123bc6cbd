"""Tied parameters: whose tensor a head uses, with transformers as the judge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.engines import load_model
from offline_quantize.evaluation.head import Head
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.runner import LayerRunner
from offline_quantize.model.structure import find_structure
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.checkpoints import decoded, tensors_of
from tests.helpers.models import tiny_model

CPU = torch.device("cpu")
EMBEDDINGS = "model.embed_tokens.weight"
WRAPPED_EMBEDDINGS = "model.language_model.embed_tokens.weight"
IDS = torch.arange(20, 40)[None]


def stored_with(directory: Path, config: dict[str, Any], *names: str) -> Path:
    """Keep only these of embeddings and head; a head that is not there yet gets random values."""
    tensors = tensors_of(directory)
    embeddings = WRAPPED_EMBEDDINGS if WRAPPED_EMBEDDINGS in tensors else EMBEDDINGS
    weight = tensors[embeddings]
    generator = torch.Generator().manual_seed(1)
    other = 0.06 * torch.randn(weight.shape, generator=generator)
    values = {
        "embeddings": {embeddings: weight},
        "head": {"lm_head.weight": other.to(weight.dtype)},
        "copy": {"lm_head.weight": weight.clone()},
    }
    kept = {name: t for name, t in tensors.items() if name not in (embeddings, "lm_head.weight")}
    for name in names:
        kept |= values[name]
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    changed = json.loads(file.read_text())
    changed["text_config"] = changed.get("text_config", {}) | config.pop("text_config", {})
    file.write_text(json.dumps({k: v for k, v in (changed | config).items() if v != {}}))
    return directory


@pytest.fixture(
    params=[
        ("llama", {"tie_word_embeddings": False}, "embeddings", "head"),
        ("llama", {"tie_word_embeddings": True}, "embeddings"),
        ("llama", {"tie_word_embeddings": True}, "embeddings", "head"),
        ("llama", {"tie_word_embeddings": True}, "embeddings", "copy"),
        ("llama", {"tie_word_embeddings": True}, "head"),
        (
            "gemma4",
            {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
            "embeddings",
            "head",
        ),
        (
            "gemma4",
            {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
            "embeddings",
        ),
        ("gemma4", {"tie_word_embeddings": True}, "embeddings", "head"),
    ],
    ids=["untied", "tied", "own", "copy", "reverse", "outer-untied", "outer-tied", "outer-own"],
)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    architecture, config, *names = request.param
    return stored_with(tiny_model(tmp_path / "model", architecture), dict(config), *names)


def test_the_head_is_the_one_that_transformers_uses(model: Path) -> None:
    """In the structure, in calibration and in the evaluation."""
    from transformers import AutoModelForCausalLM

    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    checkpoint = Checkpoint(model)
    structure = find_structure(checkpoint)
    assert set(structure.parameter_names) == set(checkpoint.tensors)
    weight = judge.lm_head.weight
    assert torch.equal(tensors_of(model)[structure.head_source].float(), weight)
    runner = LayerRunner(checkpoint, IDS, CPU, torch.float32)
    assert torch.equal(runner.model.lm_head.weight, weight)
    with torch.no_grad():
        expected = judge(IDS).logits[0]
        hidden = judge.base_model(IDS, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(load_model(model)(IDS).logits[0], expected)
    torch.testing.assert_close(Head(model, CPU).logits(hidden), expected)


def test_a_head_of_its_own_is_quantized(model: Path, tmp_path: Path) -> None:
    """And config.json makes transformers use it, and vLLM, which reads both flags."""
    weight = tensors_of(model)[find_structure(Checkpoint(model)).head_source].float()
    request = QuantizeRequest(calibration=None, quantize_lm_head=True)
    quantize(model, tmp_path / "out", request)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", config)["tie_word_embeddings"] is False
    torch.testing.assert_close(decoded(tmp_path / "out", "lm_head"), weight, rtol=0, atol=0.02)
    assert torch.equal(
        load_model(tmp_path / "out").lm_head.weight, decoded(tmp_path / "out", "lm_head")
    )


def test_config_says_untied_only_where_the_head_differs(model: Path, tmp_path: Path) -> None:
    source = json.loads((model / "config.json").read_text())
    plan = make_plan(model, QuantizeRequest(calibration=None))
    quantize(model, tmp_path / "out", plan.request)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stored = tensors_of(model)
    head = stored.get("lm_head.weight")
    embeddings = stored.get(EMBEDDINGS, stored.get(WRAPPED_EMBEDDINGS))
    both = head is not None and embeddings is not None
    expected = source["tie_word_embeddings"]
    if both and not torch.equal(head, embeddings):
        expected = False
    assert config["tie_word_embeddings"] is expected
    original, decoded_model = load_model(model), load_model(tmp_path / "out")
    assert torch.equal(original.lm_head.weight, decoded_model.lm_head.weight)


def test_what_no_tied_parameter_has_is_missing(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path / "model", "llama")
    model = stored_with(directory, {"tie_word_embeddings": True})
    with pytest.raises(QuantizeError, match=f"no tensor {EMBEDDINGS}"):
        make_plan(model)
    with pytest.raises(QuantizeError, match=f"no tensor {EMBEDDINGS}"):
        Head(model, CPU)
