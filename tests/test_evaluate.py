"""Perplexity and KL against their definitions, on a tiny model."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import copy_model, tiny_model
from offline_quantize.evaluate import compare, load_model, perplexity, windows
from offline_quantize.quantize import quantize


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # gemma2: tied head, capped logits
def test_against_the_definitions(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(tmp_path / "model", architecture)
    quantize(model, tmp_path / "out", bpw=3, calibration=None)
    reference, quantized = load_model(model), load_model(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = windows(list(range(20, 340)), 150, bos=1)
    assert tokens.shape == (2, 151) and (tokens[:, 0] == 1).all()

    with torch.no_grad():
        p, q = (torch.cat([m(window[None]).logits[0, :-1].double().log_softmax(-1) for window in tokens]) for m in (plain, quantized))
    targets = tokens[:, 1:].reshape(-1, 1)
    result = compare(reference, quantized, tokens)
    assert result.num_tokens == 300
    assert result.reference_perplexity == pytest.approx(math.exp(-p.gather(1, targets).mean()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(-q.gather(1, targets).mean()), rel=1e-5)
    assert result.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4) and result.kl > 1e-4
    assert result.top1_agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert perplexity(quantized, tokens) == pytest.approx(result.perplexity)
    assert compare(reference, reference, tokens).kl == 0


def test_a_tensor_without_a_place_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors | {"stranger": torch.ones(2)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor for \['model.norm.weight'\], no parameter for \['stranger'\]"):
        load_model(model)
