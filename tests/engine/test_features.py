"""Features of vLLM: the quantized model answers like the plain model that it stands for."""

import pytest
import torch

from tests.helpers.engine import LORA, PROMPTS

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("decoded")]


def test_features_of_vllm(run, checkpoint, dequantized, adapter):
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
    jobs = [
        {
            "model": str(model),
            "prompts": [PROMPTS[1], [*PROMPTS[1], 5, 6, 7], [20, 30, 40] * 4],
            "max_tokens": 8,
            "logprobs": False,
            **way,
            "options": {"dtype": "float32", **way.get("options", {})},
        }
        for way in ways.values()
        for model in (quantized, dequantized)
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
