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

# In each step: the engine runs the largest step when it starts, and the interpreter is slow.
FEW_TOKENS = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
COMPILED = {"enforce_eager": False}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([("qwen2", "bfloat16", {}), ("llama", "float32", COMPILED)], id="two"),
        pytest.param(
            [("llama", "float32", {}), ("phi3", "float32", {}), ("llama", "bfloat16", {})],
            id="more",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_triton_kernels_in_the_engine(cases, run, checkpoint):
    """Fused by vLLM, fused on disk, with biases; once compiled."""
    jobs = [
        {
            "model": str(checkpoint(architecture)),
            "options": {"dtype": dtype, **FEW_TOKENS, **options},
            "prompts": PROMPTS[:1],
        }
        for architecture, dtype, options in cases
    ]
    results, printed = run(jobs, **kernels_of("triton"))
    assert "They stay packed; Triton kernels run in the interpreter" in printed
    for (architecture, dtype, options), result in zip(cases, results, strict=True):
        assert_matches(result, checkpoint(architecture), 1e-3 if dtype == "float32" else 0.1)
        if options == COMPILED:  # its model, beside the sampler that every engine compiles
            assert (result["graphs"] - results[0]["graphs"], result["graph_breaks"]) == (1, 0)


@pytest.mark.matrix
def test_many_tokens_on_packed_weights(run, checkpoint):
    """More than the packed product takes at once: the weights are decoded into a workspace."""
    job = {"model": str(checkpoint("llama")), "options": {"dtype": "float32"}, "prompts": PROMPTS}
    ((result,), _) = run([job], **kernels_of("triton"))
    assert_matches(result, checkpoint("llama"), 1e-3)


@pytest.mark.parametrize(
    "architecture, options",
    [
        pytest.param("mixtral", TWO_RANKS, id="cut", marks=pytest.mark.matrix),
        pytest.param("mixtral", {**TWO_RANKS, "enable_expert_parallel": True}, id="distributed"),
        pytest.param("qwen2_moe", {}, id="beside a shared one", marks=pytest.mark.matrix),
        pytest.param("llama4_text", {}, id="weights on their input"),
    ],
)
def test_experts_on_packed_weights(architecture, options, run, checkpoint):
    """Two ranks hold half of every expert each, or every other expert."""
    job = {
        "model": str(checkpoint(architecture)),
        "prompts": PROMPTS[:1],
        "options": {"dtype": "float32", **FEW_TOKENS, **options},
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
        "options": {"dtype": "float32", **FEW_TOKENS, **options},
    }
    ((result,), _) = run([job], **kernels_of(backend))
    assert_matches(result, with_head, 1e-3)


def test_lora_on_packed_weights(run, with_head, adapter):
    job = {
        "model": str(with_head),
        "prompts": PROMPTS[:1],
        "options": {"dtype": "float32", **FEW_TOKENS, **LORA},
        "lora": adapter,
    }
    ((decoded,), _) = run([job])
    ((packed,), printed) = run([job], **kernels_of("triton"))
    assert "They stay packed" in printed and "error" not in packed, packed
    assert_same_logprobs(packed, decoded)
