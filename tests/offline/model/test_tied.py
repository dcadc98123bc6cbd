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
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.runner import LayerRunner
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


CASES: dict[str, tuple[Any, ...]] = {
    "untied": ("llama", {"tie_word_embeddings": False}, "embeddings", "head"),
    "tied": ("llama", {"tie_word_embeddings": True}, "embeddings"),
    "own": ("llama", {"tie_word_embeddings": True}, "embeddings", "head"),
    "copy": ("llama", {"tie_word_embeddings": True}, "embeddings", "copy"),
    "outer-untied": (
        "gemma4",
        {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
        "embeddings",
        "head",
    ),
    "outer-tied": (
        "gemma4",
        {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
        "embeddings",
    ),
    "outer-own": ("gemma4", {"tie_word_embeddings": True}, "embeddings", "head"),
}


def make_case(name: str, tmp_path: Path) -> Path:
    architecture, config, *names = CASES[name]
    return stored_with(tiny_model(tmp_path / "model", architecture), dict(config), *names)


@pytest.mark.parametrize("case", list(CASES))
def test_the_head_is_the_one_that_transformers_uses(case: str, tmp_path: Path) -> None:
    """In the structure, in calibration and in the evaluation."""
    from transformers import AutoModelForCausalLM

    model = make_case(case, tmp_path)
    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    checkpoint = Checkpoint(model)
    structure = find_structure(checkpoint)
    assert set(structure.expected) <= set(checkpoint.tensors)
    weight = judge.lm_head.weight
    assert torch.equal(tensors_of(model)[structure.head_source].float(), weight)
    runner = LayerRunner(checkpoint, IDS, CPU, torch.float32)
    assert torch.equal(runner.model.lm_head.weight, weight)
    with torch.no_grad():
        expected = judge(IDS).logits[0]
        hidden = judge.base_model(IDS, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(load_model(model)(IDS).logits[0], expected)
    torch.testing.assert_close(Head(model, CPU).logits(hidden), expected)


@pytest.mark.parametrize("case", ["own", "outer-untied", "outer-tied"])
def test_a_quantized_head(case: str, tmp_path: Path) -> None:
    """It is made of the head's own weight, and config.json makes all use it.

    transformers reads the outer flag, vLLM both.
    """
    model, out = make_case(case, tmp_path), tmp_path / "out"
    weight = tensors_of(model)[find_structure(Checkpoint(model)).head_source].float()
    quantize(model, out, QuantizeRequest(calibration=None, quantize_lm_head=True))
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", config)["tie_word_embeddings"] is False
    coded = decoded(out, "lm_head")
    assert (coded - weight).square().sum() < 0.001 * weight.square().sum()
    assert torch.equal(load_model(out).lm_head.weight, coded)


@pytest.mark.parametrize("case", ["own", "copy"])
def test_config_says_untied_where_the_head_differs(case: str, tmp_path: Path) -> None:
    model, out = make_case(case, tmp_path), tmp_path / "out"
    quantize(model, out, QuantizeRequest(calibration=None))
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is (case == "copy")
    assert torch.equal(tensors_of(out)["lm_head.weight"], tensors_of(model)["lm_head.weight"])


def test_embeddings_that_share_the_tensor_of_the_head(tmp_path: Path) -> None:
    """transformers shares in this direction too, but not vLLM."""
    from transformers import AutoModelForCausalLM

    directory = tiny_model(tmp_path / "model", "llama")
    model = stored_with(directory, {"tie_word_embeddings": True}, "head")
    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = judge(IDS).logits
        torch.testing.assert_close(load_model(model)(IDS).logits, expected)
    with pytest.raises(QuantizeError, match=f"{EMBEDDINGS} is tied to lm_head.weight"):
        make_plan(model)


def test_what_no_tied_parameter_has_is_missing(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path / "model", "llama")
    model = stored_with(directory, {"tie_word_embeddings": True})
    with pytest.raises(QuantizeError, match=f"no tensor {EMBEDDINGS}"):
        make_plan(model)
    with pytest.raises(QuantizeError, match=f"no tensor {EMBEDDINGS}"):
        Head(model, CPU)
