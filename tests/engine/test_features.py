"""Features of vLLM: the quantized model answers like the plain model that it stands for."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.architectures.build import build
from tests.helpers.engine import LORA, PROMPTS
from tests.helpers.house import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("decoded")]


def test_features_of_vllm(run, checkpoint, dequantized, adapter, tmp_path):
    """Served in the same way, both models generate the same tokens."""
    quantized = checkpoint("llama")
    draft = str(quantized.parent / "model")
    speculative = {"model": draft, "num_speculative_tokens": 2}
    chunked = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True}
    ways = {
        "alone": {},
        "prefix caching": {"options": {"enable_prefix_caching": True}},
        "chunked prefill": {"options": chunked},
        "structured output": {"regex": "[ab]{4,8}"},
        "lora": {"options": LORA, "lora": adapter},
        "draft model": {"options": {"speculative_config": speculative}},
    }
    if torch.cpu._is_avx512_supported():  # else vLLM's CPU build has no fp8 cache
        ways["fp8 kv cache"] = {"options": {"kv_cache_dtype": "fp8"}}
    drafting = {"method": "mtp", "num_speculative_tokens": 1}
    ways["draft layer"] = {
        "classes": ["Glm4MoeMTPModel"],
        "options": {"speculative_config": drafting, "disable_log_stats": False},
    }
    models = dict.fromkeys(ways, (quantized, dequantized))
    models["draft layer"] = models_with_draft_layer(tmp_path)
    jobs = [
        {
            "model": str(model),
            "prompts": [PROMPTS[1], [*PROMPTS[1], 5, 6, 7], [20, 30, 40] * 4],
            "max_tokens": 8,
            "logprobs": False,
            **way,
            "options": {"dtype": "float32", **way.get("options", {})},
        }
        for name, way in ways.items()
        for model in models[name]
    ]
    results, _ = run(jobs)
    tokens = {}
    for name, ours, plain in zip(ways, results[::2], results[1::2], strict=True):
        assert ours.get("tokens") and ours["tokens"] == plain["tokens"], (name, ours, plain)
        tokens[name] = ours["tokens"]
    for name in ("prefix caching", "chunked prefill", "draft model"):
        assert tokens[name] == tokens["alone"], name
    for name in ("structured output", "lora"):
        assert tokens[name] != tokens["alone"], f"{name} changed nothing"
    for result in results[-2:]:
        assert result["accepted"] >= 6, "of 3 answers of 8 tokens"


def models_with_draft_layer(folder: Path) -> tuple[Path, Path]:
    """A tiny GLM-4 with a layer that predicts a further token: quantized, and dequantized.

    The large embeddings dominate: what the model and that layer predict depends on little but the
    last token, so they agree.
    """
    model = build(folder / "model", "glm4_moe")
    tensors = load_file(model / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    embeddings *= 20 / embeddings.float().std()
    ones = torch.ones(embeddings.shape[1], dtype=embeddings.dtype)
    tensors |= {
        name.replace(".layers.1.", ".layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.1." in name
    }
    draft = {
        "enorm.weight": ones,
        "hnorm.weight": ones,
        "eh_proj.weight": torch.cat([20 * ones.diag(), 0 * ones.diag()], dim=1),
        "embed_tokens.weight": embeddings,
        "shared_head.norm.weight": tensors["model.norm.weight"],
        "shared_head.head.weight": tensors["lm_head.weight"],
    }
    tensors |= {f"model.layers.2.{name}": tensor.clone() for name, tensor in draft.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    quantize(model, folder / "quantized", QuantizeRequest(calibration=None))
    dequantize(folder / "quantized", folder / "dequantized", torch.float32)
    return folder / "quantized", folder / "dequantized"


def test_ngram_speculation(run, checkpoint, tiny_results):
    """In a process of its own: vLLM 0.32.0 cannot start a second engine behind one."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    job = {
        "model": str(checkpoint("llama")),
        "options": {"dtype": "float32", "speculative_config": ngram},
        "logprobs": False,
    }
    ((result,), _) = run([job])
    assert result["tokens"] == tiny_results["llama"]["tokens"]


EXAMPLES = """
import vllm
from examples import generate, lora_on_quantized_base

def engine(checkpoint, made=[], start=vllm.LLM, **options):
    made += [] if made else [start(checkpoint, **options)]
    return made[0]

if __name__ == "__main__":
    vllm.LLM = engine
    options = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.1}
    lora_on_quantized_base.main(%r, %r, ["A", "B C"], **options)
    generate.main(%r, ["A", "B C"], **options)
"""


def test_examples_of_generation(environment, checkpoint, adapter):
    """Those that start an engine, which here is one for both, as that takes long."""
    base = str(checkpoint("llama"))
    command = [sys.executable, "-c", EXAMPLES % (base, adapter, base)]
    printed = subprocess.run(
        command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    answers = re.findall(r"^'(.+)'\n  base:    (.+)\n  adapter: (.+)$", printed, re.M)
    assert [prompt for prompt, *_ in answers] == ["A", "B C"]
    for prompt, plain, adapted in answers:
        assert plain != adapted and f"{prompt!r} -> {plain}" in printed
