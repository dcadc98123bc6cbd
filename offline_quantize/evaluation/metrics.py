"""What is kept of a comparison, scalars per token, and the figures made of them."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from offline_quantize.evaluation.conventions import Bos, Window


@dataclass(frozen=True)
class Scores:
    """Per scored token of every window: negative log-likelihoods; for one convention also KL (nats) and top-1 agreement."""

    windows: list[Window]
    reference_nll: list[torch.Tensor] = field(default_factory=list)
    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agreement: list[torch.Tensor] = field(default_factory=list)


def clustered_mean(sums: torch.Tensor, units: torch.Tensor) -> tuple[float, float | None]:
    """Mean per unit and its standard error, from the sums [W] over windows of ``units`` [W] each.

    Tokens of a window are correlated, windows count as independent; None for a single window.
    """
    mean = float(sums.sum() / units.sum())
    if len(sums) < 2:
        return mean, None
    return mean, float(((sums - mean * units).square().sum() * len(sums) / (len(sums) - 1)).sqrt() / units.sum())


def _sums(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([v.double().sum() for v in values])


@dataclass(frozen=True)
class Perplexity:
    """Perplexities in one convention; standard errors (``_se``) are of the paired difference, None for a single window."""

    num_windows: int
    num_tokens: int
    num_words: int | None  # what the perplexity is per, where it is not tokens
    reference: float
    quantized: float
    change_percent: float
    change_percent_se: float | None
    log_change: float
    log_change_se: float | None

    @staticmethod
    def of(scores: Scores) -> "Perplexity":
        units = torch.tensor([w.num_units for w in scores.windows], dtype=torch.float64)
        reference, quantized = _sums(scores.reference_nll), _sums(scores.nll)
        change, error = clustered_mean(quantized - reference, units)
        num_tokens, num_units = sum(w.num_scored for w in scores.windows), round(float(units.sum()))
        return Perplexity(len(units), num_tokens, None if num_units == num_tokens else num_units,
                          float((reference.sum() / units.sum()).exp()), float((quantized.sum() / units.sum()).exp()),
                          100 * math.expm1(change), None if error is None else 100 * math.exp(change) * error, change, error)


@dataclass(frozen=True)
class Divergence:
    """KL(reference || quantised) in nats over the whole vocabulary, over the scored tokens."""

    num_windows: int
    num_tokens: int
    mean: float
    mean_se: float | None
    median: float
    percentile_99_9: float
    max: float
    top1_agreement: float

    @staticmethod
    def of(scores: Scores) -> "Divergence":
        kl = torch.cat(scores.kl).double()
        mean, error = clustered_mean(_sums(scores.kl), torch.tensor([len(k) for k in scores.kl], dtype=torch.float64))
        return Divergence(len(scores.kl), len(kl), mean, error, float(kl.median()), float(kl.quantile(0.999)), float(kl.max()),
                          float(torch.cat(scores.agreement).double().mean()))


@dataclass(frozen=True)
class CheckpointResult:
    """One checkpoint against the reference: perplexity by convention, KL in the first of them."""

    checkpoint: str
    effective_bits_per_weight: float | None  # of the quantised layers; None if it is not a QAM-W checkpoint
    seconds: float
    perplexity: dict[str, Perplexity]
    kl: Divergence
    scores: Scores  # of the first convention


@dataclass(frozen=True)
class Evaluation:
    """All that was measured; ``noise`` is the reference in bfloat16 against itself in float32."""

    reference: str
    conventions: tuple[str, ...]
    bos: Bos
    noise: Scores | None
    results: list[CheckpointResult]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values, without the per-token scores."""
        return {
            "reference": self.reference, "conventions": list(self.conventions), "bos": str(self.bos), "kl_convention": self.conventions[0],
            "bfloat16_noise_floor": asdict(Divergence.of(self.noise)) if self.noise else None,
            "checkpoints": [{"checkpoint": r.checkpoint, "effective_bits_per_weight": r.effective_bits_per_weight, "seconds": r.seconds,
                             "perplexity": {name: asdict(p) for name, p in r.perplexity.items()}, "kl": asdict(r.kl)}
                            for r in self.results],
        }
