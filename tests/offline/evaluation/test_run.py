"""Every convention and every figure against an independent computation on a tiny model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_quantize.evaluation.conventions import CONVENTIONS
from offline_quantize.evaluation.engines import load_model
from offline_quantize.evaluation.request import EvaluationRequest
from offline_quantize.evaluation.run import evaluate
from offline_quantize.evaluation.wikitext import detokenized
from tests.offline.evaluation.texts import PAGES, RAW, tokenizer_of


def log_probabilities(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[T - 1, vocabulary] in float64, of every token after the first."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def spelled_out(
    convention: str, raw: str, tokenizer: Any, gemma: bool
) -> tuple[list[tuple[list[int], int]], float]:
    """(tokens of a window, number of the first scored one), and the divisor, spelled out simply."""

    def encode(string: str) -> list[int]:
        return tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    bos = [tokenizer.bos_token_id] if gemma else []
    lines = raw[: -1 if raw.endswith("\n") else None].split("\n")
    ids = encode("\n\n".join(line + "\n" if line.strip() else "" for line in lines))
    windows = []
    if convention == "gptq-2048":
        windows = [(bos + ids[i * 2048 : (i + 1) * 2048], 1) for i in range(len(ids) // 2048)]
    elif convention == "hf-stride":  # every token from the first window that has it
        seen: set[int] = set() if gemma else {0}
        for begin in range(0, len(ids), 512):
            new = [i for i in range(begin, min(begin + 2048, len(ids))) if i not in seen]
            if new:
                windows.append((bos + ids[begin : new[-1] + 1], new[0] - begin + len(bos)))
                seen.update(new)
    elif convention == "llama.cpp-512":
        ids = bos + encode(raw)
        chunks = [ids[i * 512 : (i + 1) * 512] for i in range(len(ids) // 512)]
        windows = [((bos or chunk[:1]) + chunk[1:], 257) for chunk in chunks]
    else:
        windows = [([tokenizer.bos_token_id, *encode(detokenized(page))], 1) for page in PAGES]
        return windows, sum(len(re.split(r"\s+", page)) for page in PAGES)
    return windows, sum(len(ids) - first for ids, first in windows)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_perplexity_and_kl_from_their_definitions(convention: str, pair: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    directory, quantized = pair
    gemma = "gemma" in str(directory)
    raw = "\n" + "\n".join(PAGES) if convention == "lm-eval" else RAW
    request = EvaluationRequest(
        directory, (quantized,), raw, (convention,), dtype=torch.float32, noise_windows=0
    )
    evaluation = evaluate(request)
    (result,) = evaluation.results
    windows, divisor = spelled_out(convention, raw, tokenizer_of(directory), gemma)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    decoded = load_model(quantized)

    sums, kls, same = torch.zeros(2, dtype=torch.float64), [], []
    for ids, first in windows:
        p, q = (log_probabilities(model, ids)[first - 1 :] for model in (plain, decoded))
        targets = torch.tensor(ids[first:])[:, None]
        sums += torch.stack([-x.gather(1, targets).sum() for x in (p, q)])
        kls.append((p.exp() * (p - q)).sum(1))
        same.append(p.argmax(1) == q.argmax(1))
    expected, kl = (sums / divisor).exp().tolist(), torch.cat(kls)
    agreement = float(torch.cat(same).double().mean())

    perplexity = result.perplexity[convention]
    assert [perplexity.reference, perplexity.quantized] == pytest.approx(expected, rel=1e-5)
    change = 100 * (expected[1] / expected[0] - 1)
    assert perplexity.change_percent == pytest.approx(change, rel=1e-3)
    assert (perplexity.num_windows, perplexity.num_tokens) == (len(windows), len(kl))
    assert perplexity.num_words == (divisor if convention == "lm-eval" else None)
    assert result.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4) and result.kl.mean > 1e-4
    assert result.kl.median == pytest.approx(float(kl.median()), rel=1e-3)
    assert result.kl.percentile_99_9 == pytest.approx(float(kl.quantile(0.999)), rel=1e-3)
    assert result.kl.max == pytest.approx(float(kl.max()), rel=1e-3)
    assert result.kl.top1_agreement == pytest.approx(agreement, abs=2 / len(kl))
    assert str(evaluation.bos) == ("every window" if gemma else "none")
    assert result.effective_bits_per_weight == pytest.approx(3.1, abs=0.15)


def test_a_model_does_not_differ_from_itself(tiny_llama: Path) -> None:
    request = EvaluationRequest(tiny_llama, (tiny_llama,), RAW, ("llama.cpp-512",), windows=2)
    evaluation = evaluate(request)
    (result,) = evaluation.results
    change = result.perplexity["llama.cpp-512"].change_percent
    assert result.kl.mean == result.kl.max == change == 0
    assert result.kl.top1_agreement == 1 and result.effective_bits_per_weight is None
    noise = evaluation.noise  # bfloat16 against float32
    assert noise is not None and 0 < float(torch.cat(noise.kl).mean()) < 1e-2


def test_progress_counts_every_window_of_every_run(tiny_llama: Path) -> None:
    request = EvaluationRequest(
        tiny_llama, (tiny_llama,), RAW, ("llama.cpp-512",), windows=2, noise_windows=1
    )
    calls: list[tuple[str, int, int]] = []
    evaluate(request, lambda stage, done, total: calls.append((stage, done, total)))
    # Two windows of the reference, two of the checkpoint, and one in two dtypes for the noise.
    assert calls == [("evaluating", done, 6) for done in range(1, 7)]
