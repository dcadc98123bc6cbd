"""Sensitivities, against measured divergences."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offline_quantize.calibration.sensitivity import (
    Sensitivity,
    TensorStack,
    feedback_cost,
    from_state,
    measure_sensitivities,
    to_state,
)
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.structure import InputGroup
from offline_quantize.planning.plan import make_plan
from offline_quantize.ranks import ALONE, Ranks
from tests.architectures.build import build
from tests.helpers.ranks import in_ranks


def test_sensitivity_predicts_the_divergence(tiny_llama: Path, tmp_path: Path) -> None:
    """White noise on the weights of one group at a time.

    Its measured KL divergence is in proportion to the prediction.
    """
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, 300, (24, 64), generator=generator)
    plan = make_plan(tiny_llama)
    sensitivities = measure_sensitivities(
        plan.checkpoint,
        plan.layers,
        tokens,
        torch.device("cpu"),
        tmp_path,
        dtype=torch.float32,
        hessian_batches=6,
        cost=lambda hessian, num_tokens: float(hessian.trace()),  # noise is not fed back
    )
    for importance in (s.importance for groups in sensitivities for s in groups):
        assert importance.shape == (tokens.numel(),) and importance.min() >= 0
        assert importance.mean() == pytest.approx(1)
    model = load_model(tiny_llama)
    with torch.no_grad():
        reference = model(tokens).logits.log_softmax(-1)
    ratios = [
        noise_divergence(model, reference, tokens, group, generator) / prediction.distortion_cost
        for layer, predicted in zip(plan.layers, sensitivities, strict=True)
        for group, prediction in zip(layer.groups, predicted, strict=True)
    ]
    assert len(ratios) == 8 and max(ratios) < 1.6 * min(ratios), ratios


@torch.no_grad()
def noise_divergence(
    model: Any,
    reference: torch.Tensor,
    tokens: torch.Tensor,
    group: InputGroup,
    generator: torch.Generator,
) -> float:
    """KL divergence from ``reference`` [windows, T, vocabulary] of six draws of noise together."""
    weights = [model.get_submodule(linear.name).weight for linear in group]
    originals = [w.clone() for w in weights]
    divergence = 0.0
    for _ in range(6):
        for weight, original in zip(weights, originals, strict=True):
            norms = original.square().mean(1, keepdim=True).sqrt()
            noise = torch.randn(weight.shape, generator=generator) * norms
            weight.copy_(original + 0.02 * noise)
        difference = reference - model(tokens).logits.log_softmax(-1)
        divergence += float((reference.exp() * difference).sum(-1).mean())
    for weight, original in zip(weights, originals, strict=True):
        weight.copy_(original)
    return divergence


def test_progress_and_state(tiny_llama: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny_llama)
    tokens = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(7))
    seen = []
    sensitivities = measure_sensitivities(
        plan.checkpoint,
        plan.layers,
        tokens,
        torch.device("cpu"),
        tmp_path,
        lambda *step: seen.append(step),
    )
    assert seen == [("sensitivity", done, 6) for done in (0, 1, 2, 4, 6)]
    assert not list(tmp_path.iterdir())
    state = to_state(sensitivities)
    restored = to_state(from_state(state, len(plan.layers)))
    assert list(restored) == list(state)
    assert all(torch.equal(restored[name], state[name]) for name in state)
    assert from_state({}, len(plan.layers)) == []


@pytest.mark.parametrize("architecture", ["mixtral", "gemma3n_text", "deepseek_v4"])
def test_processes_share_the_windows(architecture: str, tmp_path: Path) -> None:
    """Labels are drawn alike, and the same batches make the Hessians, whoever has them.

    Hidden states of Gemma 3n have another dimension before that of the windows, those of
    DeepSeek-V4 one behind that of the tokens.
    """
    plan = make_plan(build(tmp_path / "model", architecture))
    tokens = torch.randint(0, 300, (17, 32), generator=torch.Generator().manual_seed(9))

    def measure(ranks: Ranks) -> list[list[Sensitivity]]:
        cpu = torch.device("cpu")
        return measure_sensitivities(
            plan.checkpoint, plan.layers, tokens, cpu, tmp_path, ranks=ranks
        )

    alone = to_state(measure(ALONE))
    for found in in_ranks(3, measure):
        torch.testing.assert_close(to_state(found), alone, rtol=1e-3, atol=1e-5)


def test_nothing_but_zeros_counts_for_nothing() -> None:
    assert feedback_cost(torch.zeros(64, 64), 100) == 0


def test_layers_may_differ_in_size_and_dtype(tmp_path: Path) -> None:
    """As hidden states do that become float32 in the first layer."""
    lists = [
        [torch.ones(2, 3, dtype=torch.bfloat16)],
        [torch.full((4, 5), 2.0), torch.arange(3)],
        [torch.zeros(1)],
        [torch.zeros(700, 3)],
    ]
    with (tmp_path / "file").open("w+b") as file:
        stack = TensorStack(file, tmp_path)
        for tensors in lists:
            stack.push(tensors)
        for tensors in reversed(lists):
            found = stack.pop()
            assert [t.dtype for t in found] == [t.dtype for t in tensors]
            assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
