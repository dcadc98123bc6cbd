"""The scalars per token that a comparison keeps, and the figures computed from them."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from offline_quantize.evaluation.conventions import Bos, Window


@dataclass(frozen=True)
class Scores:
    """Per window, one value for every scored token: each list holds [num_scored] float32 tensors.

    Attributes:
        windows: what is scored; the lists are filled in their order.
        reference_nll: negative log-likelihoods of the reference, in nats.
        nll: the same of the other model.
        kl: KL(reference || other) in nats over the whole vocabulary; of one convention only.
        agreement: 1 where both models find the same token most likely, else 0; like ``kl``.
    """

    windows: list[Window]
    reference_nll: list[torch.Tensor] = field(default_factory=list)
    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agreement: list[torch.Tensor] = field(default_factory=list)


def clustered_mean(sums: torch.Tensor, units: torch.Tensor) -> tuple[float, float | None]:
    """Mean per unit, and its standard error.

    Tokens of a window are correlated, windows count as independent.

    Args:
        sums: [W] float64, the sum of the values of each window.
        units: [W] float64, the number of units of each window.
    Returns:
        The mean and the standard error, which is None for a single window.
    """
    mean = float(sums.sum() / units.sum())
    if len(sums) < 2:
        return mean, None
    variance = (sums - mean * units).square().sum() * len(sums) / (len(sums) - 1)
    return mean, float(variance.sqrt() / units.sum())


def _sums(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([v.double().sum() for v in values])


@dataclass(frozen=True)
class Perplexity:
    """Perplexities in one convention.

    Attributes:
        num_windows: windows that were scored. num_tokens: scored tokens.
        num_words: number of words, where the perplexity is per word; else None.
        reference: perplexity of the reference. quantized: of the other model.
        change_percent: of the perplexity. log_change: of its logarithm.
        change_percent_se, log_change_se: standard errors of the paired difference, None for a
            single window.
    """

    num_windows: int
    num_tokens: int
    num_words: int | None
    reference: float
    quantized: float
    change_percent: float
    change_percent_se: float | None
    log_change: float
    log_change_se: float | None

    @staticmethod
    def of(scores: Scores) -> "Perplexity":
        """The figures of one convention's scores."""
        units = torch.tensor([w.num_units for w in scores.windows], dtype=torch.float64)
        reference, quantized = _sums(scores.reference_nll), _sums(scores.nll)
        change, error = clustered_mean(quantized - reference, units)
        num_tokens = sum(w.num_scored for w in scores.windows)
        num_units = round(float(units.sum()))
        return Perplexity(
            num_windows=len(units),
            num_tokens=num_tokens,
            num_words=None if num_units == num_tokens else num_units,
            reference=float((reference.sum() / units.sum()).exp()),
            quantized=float((quantized.sum() / units.sum()).exp()),
            change_percent=100 * math.expm1(change),
            change_percent_se=None if error is None else 100 * math.exp(change) * error,
            log_change=change,
            log_change_se=error,
        )


@dataclass(frozen=True)
class Divergence:
    """KL(reference || other) in nats over the whole vocabulary, over the scored tokens.

    Attributes:
        num_windows: windows that were scored. num_tokens: scored tokens.
        mean, median, percentile_99_9, max: of the tokens' KL.
        mean_se: standard error of the mean, None for a single window.
        top1_agreement: share of tokens at which both models find the same token most likely.
    """

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
        """The figures of the scores of the convention in which KL is measured."""
        kl = torch.cat(scores.kl).double()
        counts = torch.tensor([len(k) for k in scores.kl], dtype=torch.float64)
        mean, error = clustered_mean(_sums(scores.kl), counts)
        return Divergence(
            num_windows=len(scores.kl),
            num_tokens=len(kl),
            mean=mean,
            mean_se=error,
            median=float(kl.median()),
            percentile_99_9=float(kl.quantile(0.999)),
            max=float(kl.max()),
            top1_agreement=float(torch.cat(scores.agreement).double().mean()),
        )


@dataclass(frozen=True)
class CheckpointResult:
    """One checkpoint against the reference.

    Attributes:
        checkpoint: its directory.
        effective_bits_per_weight: of the quantized layers; None if it is no QAM-W checkpoint.
        seconds: that measuring it took.
        perplexity: by convention.
        kl: in the first convention. scores: of the first convention.
    """

    checkpoint: str
    effective_bits_per_weight: float | None
    seconds: float
    perplexity: dict[str, Perplexity]
    kl: Divergence
    scores: Scores

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values, without the scores."""
        return {
            "checkpoint": self.checkpoint,
            "effective_bits_per_weight": self.effective_bits_per_weight,
            "seconds": self.seconds,
            "perplexity": {name: asdict(p) for name, p in self.perplexity.items()},
            "kl": asdict(self.kl),
        }


@dataclass(frozen=True)
class Evaluation:
    """All that was measured.

    Attributes:
        reference: directory of the reference.
        conventions: that were measured; KL in the first.
        bos: where BOS went.
        noise: the reference in bfloat16 against itself in float32; None if it was not measured.
        results: of every checkpoint.
    """

    reference: str
    conventions: tuple[str, ...]
    bos: Bos
    noise: Scores | None
    results: list[CheckpointResult]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values, without the per-token scores."""
        return {
            "reference": self.reference,
            "conventions": list(self.conventions),
            "bos": str(self.bos),
            "kl_convention": self.conventions[0],
            "bfloat16_noise_floor": asdict(Divergence.of(self.noise)) if self.noise else None,
            "checkpoints": [result.to_dict() for result in self.results],
        }
