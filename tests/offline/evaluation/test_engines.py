"""Loading a model for transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.engines import load_model
from offline_quantize.evaluation.request import EvaluationRequest
from offline_quantize.evaluation.run import evaluate
from tests.helpers.models import copy_model, tiny_model
from tests.offline.evaluation.texts import RAW


def test_a_tensor_without_a_place_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors | {"stranger": torch.ones(2)}, file)
    expected = r"no tensor for \['model.norm.weight'\], no parameter for \['stranger'\]"
    with pytest.raises(QuantizeError, match=expected):
        load_model(model)
    # What transformers and vLLM leave out too: tables of old checkpoints, layers that predict
    # further tokens.
    left_out = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.layers.2.mlp.up_proj.weight": torch.ones(2),
    }
    save_file(load_file(tiny_llama / "model.safetensors") | left_out, file)
    with pytest.raises(QuantizeError, match=r"no parameter for .*layers\.2\.mlp"):
        load_model(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    load_model(model)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    request = EvaluationRequest(
        tiny_llama,
        (model,),
        RAW,
        conventions=("llama.cpp-512",),
        windows=1,
        noise_windows=0,
    )
    expected = r"no tensor lm_head.weight, which the logits need"
    with pytest.raises(QuantizeError, match=expected):
        evaluate(request)


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
def test_dtypes_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    """In bfloat16, the biases of routers stay float32: other experts would be chosen."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(tmp_path / "model", architecture)
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    tensors = load_model(model, torch.bfloat16).state_dict()
    common = tensors.keys() & expected.keys()
    assert {name: tensors[name].dtype for name in common} == {
        name: expected[name].dtype for name in common
    }
    kept = [name for name in common if tensors[name].dtype == torch.float32]
    assert bool(kept) == (architecture != "llama")
    assert all(torch.equal(tensors[name], expected[name]) for name in kept)
