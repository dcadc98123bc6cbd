"""The engine computes what the transformers model with decoded weights computes."""

import pytest
import torch

from offline_quantize.checkpoints.dequantize import dequantize
from tests.helpers.engine import ARCHITECTURES, assert_matches, assert_same_logprobs

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("decoded")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_computes_the_decoded_model(architecture, tiny_results, checkpoint):
    assert_matches(tiny_results[architecture], checkpoint(architecture), 1e-3)


def test_engine_in_bfloat16(tiny_results, checkpoint):
    assert_matches(tiny_results["llama-bfloat16"], checkpoint("llama"), 0.1)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_engine_in_float16(architecture, tiny_results, checkpoint):
    assert_matches(tiny_results[f"{architecture}-float16"], checkpoint(architecture), 0.02)


def test_compiled_engine(tiny_results, checkpoint):
    """The whole model is one graph, compiled once for all sizes of a batch.

    Every engine compiles its sampler, also one that does not compile its model.
    """
    result, eager = tiny_results["llama-compiled"], tiny_results["llama"]
    assert_matches(result, checkpoint("llama"), 1e-3)
    assert (result["graphs"] - eager["graphs"], result["graph_breaks"]) == (1, 0)


@pytest.mark.parametrize("model", ["mixtral-dummy", "mixtral-plain-dummy"])
def test_random_weights(model, tiny_results):
    assert torch.tensor(tiny_results[model]["logprobs"][0]).isfinite().all()


def test_latent_attention_and_grouped_experts(run, checkpoint):
    """DeepSeek-V3, which vLLM computes in its own way: compared with its plain model in vLLM.

    In bfloat16, because vLLM's latent attention for CPUs with AMX has no float32.
    """
    quantized = checkpoint("deepseek_v3")
    plain = quantized.parent / "dequantized"
    dequantize(quantized, plain, torch.bfloat16)
    jobs = [{"model": str(m), "options": {"dtype": "bfloat16"}} for m in (quantized, plain)]
    (ours, theirs), _ = run(jobs)
    assert ours["tokens"] == theirs["tokens"]
    assert_same_logprobs(ours, theirs)
