"""Error feedback and the allocation of bits, against slow truths."""

import itertools
from pathlib import Path

import pytest
import torch

from offline_quantize.calibration import hessians as calibration
from offline_quantize.calibration import sensitivity
from offline_quantize.planning.allocation import allocate
from offline_quantize.encoding.group import encode_group
from offline_quantize.evaluation.run import load_model
from offline_quantize.encoding.feedback import DAMPING, encode_with_feedback, encode_with_feedback_slow, factor, feedback_matrix, shrink
from offline_quantize.planning.plan import make_plan
from offline_quantize.calibration.sensitivity import measure_sensitivities
from qamw_kernels.format.codebook import load_codebook
from qamw_kernels.codec.nearest import nearest


def correlated_hessian(num_inputs: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Second moment [K, K] float64 of inputs with strong correlations and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64) / num_inputs**0.5
    x = torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64) @ (mixing + 0.3 * torch.eye(num_inputs))
    x *= torch.logspace(-1, 1, num_inputs, dtype=torch.float64)[torch.randperm(num_inputs, generator=generator)]
    return x.T @ x / num_tokens


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((difference.double() @ hessian) * difference.double()).sum())


@pytest.mark.parametrize("index_bits", [6, 11])
@pytest.mark.parametrize("num_inputs", [64, 320])  # within one lazy block, and over three
def test_feedback_is_regression_on_what_is_left(num_inputs: int, index_bits: int) -> None:
    hessian = correlated_hessian(num_inputs, 2000)
    coordinates = torch.randn(24, num_inputs, generator=torch.Generator().manual_seed(1))
    root = factor(hessian, 0.0)
    torch.testing.assert_close(root @ root.T, hessian)
    fast = encode_with_feedback(coordinates, feedback_matrix(root), index_bits)
    slow = encode_with_feedback_slow(coordinates.double(), hessian, index_bits)
    assert fast.shape == slow.shape == (24, num_inputs // 2) and fast.dtype == torch.int16
    # Rounding may turn one choice, and with it those behind it: rows must be equal, or equally good.
    codebook = load_codebook(index_bits)
    for row in range(len(coordinates)):
        if not torch.equal(fast[row], slow[row]):
            errors = [output_error(coordinates[row : row + 1] - codebook[i[row].int()].view(1, -1), hessian) for i in (fast, slow)]
            assert errors[0] == pytest.approx(errors[1], rel=0.25)
    assert (fast == slow).all(1).float().mean() >= 0.75


def test_what_few_tokens_show_is_believed_less() -> None:
    """As an expert that is seldom chosen has it: the error under all tokens' Hessian becomes smaller."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 320, generator=generator, dtype=torch.float64)
    inputs = inputs @ (torch.randn(320, 320, generator=generator, dtype=torch.float64) / 320**0.5 + 0.3 * torch.eye(320))
    coordinates, codebook = torch.randn(48, 320, generator=generator), load_codebook(8)

    def error(hessian: torch.Tensor) -> float:
        indices = encode_with_feedback(coordinates, feedback_matrix(factor(hessian, DAMPING)), 8)
        return output_error(coordinates - codebook[indices.int()].view(48, 320), inputs.T @ inputs / len(inputs))

    few = inputs[:80].T @ inputs[:80] / 80
    shrunk = shrink(few.clone(), 80)
    assert torch.equal(shrunk.diagonal(), few.diagonal())
    torch.testing.assert_close(shrunk.triu(1), few.triu(1) / 5)
    assert error(shrunk) < 0.9 * error(few)



def test_feedback_without_correlations_is_nearest() -> None:
    coordinates = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    feedback = feedback_matrix(factor(torch.diag(torch.rand(128, dtype=torch.float64) + 0.1), 0.01))
    assert not feedback.any()
    assert torch.equal(encode_with_feedback(coordinates, feedback, 9).flatten(), nearest(coordinates.view(-1, 2), 9))


@pytest.mark.parametrize("index_bits", [7, 11])
def test_feedback_lowers_the_output_error(index_bits: int) -> None:
    hessian = correlated_hessian(256, 8000)
    weights = {"a": torch.randn(64, 256, generator=torch.Generator().manual_seed(3)), "b": torch.randn(32, 256)}
    hessians = dict.fromkeys(weights, hessian.float())
    errors = {encoder: encode_group(weights, index_bits, 128, hessians, encoder).errors for encoder in ("feedback", "nearest")}
    for name in weights:
        assert errors["feedback"][name]["output_nmse"] < 0.6 * errors["nearest"][name]["output_nmse"]


@pytest.mark.parametrize("kind", ["dead channels", "rank one", "few tokens", "tiny", "huge"])
def test_any_hessian_is_safe(kind: str) -> None:
    hessian = correlated_hessian(128, 40 if kind == "few tokens" else 500).float()
    if kind == "dead channels":
        hessian[:, ::3] = 0
        hessian[::3] = 0
    elif kind == "rank one":
        hessian = torch.outer(hessian[0], hessian[0])
    elif kind in ("tiny", "huge"):
        hessian *= 1e-30 if kind == "tiny" else 1e30
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(4))
    weight[3] = 0
    weight[:, 5] = 0
    encoded = encode_group({"w": weight}, 10, 64, {"w": hessian}, "feedback")
    nearest_errors = encode_group({"w": weight}, 10, 64, {"w": None}, "nearest").errors["w"]
    assert encoded.quantized["w"].row_norms[3] == 0
    assert 0 < encoded.errors["w"]["output_nmse"] < 0.01
    assert encoded.errors["w"]["nmse"] < 30 * nearest_errors["nmse"]


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        factor(torch.full((4, 4), torch.inf, dtype=torch.float64), 0.1)


def test_allocation_is_the_best_there_is() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        sensitivities = (torch.randn(4, generator=generator) * 2).exp().tolist()
        sizes = [8, 8, 8, 8]
        budget = 8 * int(torch.randint(26, 46, (1,), generator=generator))

        def cost(bits: tuple[int, ...], sensitivities: list[float] = sensitivities) -> float:
            return sum(s * 2.0**-b for s, b in zip(sensitivities, bits, strict=True))

        best = min((bits for bits in itertools.product(range(6, 13), repeat=4) if 8 * sum(bits) <= budget), key=cost)
        chosen = allocate(sensitivities, sizes, budget)
        assert 8 * sum(chosen) <= budget and cost(tuple(chosen)) == pytest.approx(cost(best))
    assert allocate([1.0, 1.0], [4, 4], 1000) == [12, 12]
    assert allocate([0.0, 1.0], [4, 4], 4 * 18) == [6, 12]


def test_sensitivity_predicts_the_divergence(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """White noise on the weights of one group at a time: its measured KL divergence is in proportion to the prediction."""
    monkeypatch.setattr(calibration, "DTYPE", torch.float32)
    monkeypatch.setattr(sensitivity, "HESSIAN_BATCHES", 6)
    monkeypatch.setattr(sensitivity, "_feedback_error", lambda hessian, num_tokens: float(hessian.trace()))  # noise is not fed back
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, 300, (24, 64), generator=generator)
    plan = make_plan(tiny_llama)
    sensitivities = measure_sensitivities(plan, tokens, torch.device("cpu"), tmp_path)
    for importance in (s.importance for groups in sensitivities for s in groups):
        assert importance.shape == (tokens.numel(),) and importance.min() >= 0 and importance.mean() == pytest.approx(1)
    model = load_model(tiny_llama)
    with torch.no_grad():
        reference = model(tokens).logits.log_softmax(-1)
        ratios = []
        for groups, predicted in zip(plan.layers, sensitivities, strict=True):
            for group, prediction in zip(groups, (s.distortion_cost for s in predicted), strict=True):
                weights = [model.get_submodule(linear.name).weight for linear in group]
                originals = [w.clone() for w in weights]
                kl = 0.0
                for _ in range(6):
                    for weight, original in zip(weights, originals, strict=True):
                        noise = torch.randn(weight.shape, generator=generator) * original.square().mean(1, keepdim=True).sqrt()
                        weight.copy_(original + 0.02 * noise)
                    kl += float((reference.exp() * (reference - model(tokens).logits.log_softmax(-1))).sum(-1).mean())
                for weight, original in zip(weights, originals, strict=True):
                    weight.copy_(original)
                ratios.append(kl / prediction)
    assert len(ratios) == 8 and max(ratios) < 1.6 * min(ratios), ratios


def test_nothing_but_zeros_counts_for_nothing() -> None:
    assert sensitivity._feedback_error(torch.zeros(64, 64), 100) == 0
