"""The engine on packed weights: the real Triton kernels, run by Triton's interpreter."""

import pytest

from tests.helpers.engine import (
    LORA,
    PROMPTS,
    TWO_RANKS,
    assert_matches,
    assert_same_logprobs,
    kernels_of,
)

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("packed")]


def test_triton_kernels_in_the_engine(run, checkpoint):
    """Fused by vLLM, fused on disk, with biases; once in bfloat16, once compiled."""
    architectures = ["llama", "phi3", "qwen2", "llama", "llama"]
    dtypes = ["float32", "float32", "float32", "bfloat16", "float32"]
    jobs = [
        {
            "model": str(checkpoint(architecture)),
            "options": {"dtype": dtype},
            "prompts": PROMPTS[:1],
        }
        for architecture, dtype in zip(architectures, dtypes, strict=True)
    ]
    jobs[0]["prompts"] = PROMPTS  # the interpreter is slow, so a long prompt only once
    jobs[-1]["options"] |= {"enforce_eager": False, "max_num_batched_tokens": 64}
    results, printed = run(jobs, **kernels_of("triton"))
    assert "They stay packed; Triton kernels run in the interpreter" in printed
    for architecture, dtype, result in zip(architectures, dtypes, results, strict=True):
        tolerance = 1e-3 if dtype == "float32" else 0.1
        assert_matches(result, checkpoint(architecture), tolerance)
    assert (results[-1]["graphs"], results[-1]["graph_breaks"]) == (1, 0)


@pytest.mark.parametrize(
    "architecture, options",
    [
        pytest.param("mixtral", TWO_RANKS, id="cut", marks=pytest.mark.matrix),
        pytest.param("mixtral", {**TWO_RANKS, "enable_expert_parallel": True}, id="distributed"),
        pytest.param("qwen2_moe", {}, id="beside a shared one", marks=pytest.mark.matrix),
    ],
)
def test_experts_on_packed_weights(architecture, options, run, checkpoint):
    """Two ranks hold half of every expert each, or every other expert."""
    job = {
        "model": str(checkpoint(architecture)),
        "prompts": PROMPTS[:1],
        "options": {"dtype": "float32", **options},
    }
    ((result,), printed) = run([job], **kernels_of("triton"))
    assert "They stay packed" in printed
    assert_matches(result, checkpoint(architecture), 1e-3)


@pytest.mark.parametrize(
    "backend, options",
    [
        pytest.param("decode", {}, id="decoded"),
        pytest.param("decode", TWO_RANKS, id="decoded, two ranks", marks=pytest.mark.matrix),
        pytest.param("triton", {}, id="packed", marks=pytest.mark.matrix),
        pytest.param("triton", TWO_RANKS, id="packed, two ranks"),
    ],
)
def test_quantized_head(backend, options, run, with_head):
    job = {
        "model": str(with_head),
        "prompts": PROMPTS[:1],
        "options": {"dtype": "float32", **options},
    }
    ((result,), _) = run([job], **kernels_of(backend))
    assert_matches(result, with_head, 1e-3)


def test_lora_on_packed_weights(run, with_head, adapter):
    job = {
        "model": str(with_head),
        "prompts": PROMPTS[:1],
        "options": {"dtype": "float32", **LORA},
        "lora": adapter,
    }
    ((decoded,), _) = run([job])
    ((packed,), printed) = run([job], **kernels_of("triton"))
    assert "They stay packed" in printed and "error" not in packed, packed
    assert_same_logprobs(packed, decoded)
