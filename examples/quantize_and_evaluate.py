"""Quantize a model at several rates from Python, and plot what each of them costs.

    python -m examples.quantize_and_evaluate MODEL TEXT OUT

MODEL is a directory, TEXT a UTF-8 file, OUT a new directory for checkpoints and ``rates.png``.
It takes as long as four runs of ``qamw quantize``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from offline_quantize.evaluation.request import EvaluationRequest
from offline_quantize.evaluation.run import evaluate
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest

WINDOWS = 8


def main(model: Path, text: Path, out: Path, rates: Sequence[float] = (4, 5, 5.5, 6)) -> None:
    """Write a checkpoint for each rate, and a plot of their KL divergence to the model."""
    checkpoints, effective = [], []
    for bits in rates:
        checkpoints.append(out / f"{bits:g}")
        report = quantize(model, checkpoints[-1], QuantizeRequest(bpw=bits))
        effective.append(report.effective_bits_per_weight)
    request = EvaluationRequest(
        reference=model,
        checkpoints=tuple(checkpoints),
        text=text.read_text(encoding="utf-8"),
        conventions=("llama.cpp-512",),
        windows=WINDOWS,
        noise_windows=0,
    )
    kl = [result["kl"]["mean"] for result in evaluate(request).to_dict()["checkpoints"]]
    for checkpoint, bits, nats in zip(checkpoints, effective, kl, strict=True):
        print(f"{checkpoint}: {bits:.2f} bits per weight, KL {nats:.4f} nats")
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    axis.plot(effective, kl, marker="o")
    axis.set(xlabel="effective bits per weight", ylabel="mean KL divergence, nats", yscale="log")
    figure.savefig(out / "rates.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
