"""Real models, served: the perplexity is that of the decoded model."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from offline_quantize.evaluation.engines import load_model
from tests.helpers.texts import EVALUATION_TEXT
from tools.real_models import real_model

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("real")]

WINDOW, NUM_WINDOWS = 512, 3


def perplexity(model: torch.nn.Module, prompts: list[list[int]]) -> float:
    """exp of the mean cross-entropy of every token but the first of each prompt."""
    with torch.no_grad():
        losses = [
            cross_entropy(
                model(torch.tensor([prompt])).logits[0, :-1].float(),
                torch.tensor(prompt[1:]),
            )
            for prompt in prompts
        ]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize(
    "models",
    [
        pytest.param(["smollm2-135m"], id="one"),
        pytest.param(["gemma3-270m", "qwen2.5-coder-0.5b"], id="more", marks=pytest.mark.matrix),
    ],
)
def test_served_perplexity_is_that_of_the_decoded_model(models, run, real_checkpoint):
    """Llama with GQA; Qwen2 with biases; Gemma 3 with q/k norms, a sliding window and its BOS."""
    from transformers import AutoTokenizer

    jobs, tokens = [], {}
    for name in models:
        tokenizer = AutoTokenizer.from_pretrained(real_checkpoint(name))
        text = EVALUATION_TEXT.read_text()
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        lead = [tokenizer.bos_token_id] if "gemma" in name else []  # which Gemma needs
        tokens[name] = [lead + ids[i * WINDOW : (i + 1) * WINDOW] for i in range(NUM_WINDOWS)]
        jobs.append(
            {
                "model": str(real_checkpoint(name)),
                "prompts": tokens[name],
                "max_tokens": 1,
                "options": {
                    "dtype": "float32",
                    "max_model_len": 1024,
                    "max_num_batched_tokens": 1024,
                },
            }
        )
    results, _ = run(jobs, OMP_NUM_THREADS="2")
    for (name, prompts), result in zip(tokens.items(), results, strict=True):
        assert "error" not in result, result
        logprobs = torch.tensor(result["logprobs"], dtype=torch.float64)
        served = math.exp(-logprobs.mean())
        decoded = perplexity(load_model(real_checkpoint(name)), prompts)
        original = perplexity(load_model(real_model(name)), prompts)
        assert served == pytest.approx(decoded, rel=1e-3), name
        assert served == pytest.approx(original, rel=0.06), name
        assert original < 60, name  # it is a language model
