"""What the study says: tables, plots and checks of the paper's claims, all from results/*.jsonl. ``python tests/study/report.py``."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]


def load_rows(directory: Path = RESULTS) -> list[Row]:
    """All rows, by model and then in the order of the study."""
    return [json.loads(line) for file in sorted(directory.glob("*.jsonl")) for line in file.read_text().splitlines()]


def by_model(rows: list[Row]) -> dict[str, list[Row]]:
    return {model: list(group) for model, group in groupby(rows, lambda row: row["model"])}


def table(rows: list[Row]) -> str:
    """A Markdown table of one model's rows, by effective rate."""
    lines = ["| method | effective bpw | perplexity | change, % | mean KL | 99.9 % KL | same top-1, % |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["effective_bits_per_weight"], row["method"])):
        bits, ppl, kl = row["effective_bits_per_weight"], row["perplexity"], row["kl"]
        change = f"{ppl['change_percent']:+.2f} ± {ppl['change_percent_se'] or 0:.2f}"
        lines.append(f"| {row['method']} | {bits:.3f} | {ppl['quantized']:.3f} | {change} | {kl['mean']:.4f} | "
                     f"{kl['percentile_99_9']:.3f} | {100 * kl['top1_agreement']:.1f} |")
    return "\n".join(lines)


def divergence_predicts_perplexity(rows: list[Row]) -> float:
    """Spearman's rank correlation of KL and perplexity change over all quantised rows (the paper: 0.99)."""
    some = [row for row in rows if row["method"] != "bf16"]
    return float(spearmanr([row["kl"]["mean"] for row in some], [row["perplexity"]["change_percent"] for row in some]).statistic)


def joint_against_polar(rows: list[Row]) -> list[tuple[float, float, float]]:
    """(bits per weight, points of perplexity change that the joint codebook saves, polar KL over joint KL), without calibration."""
    found = {row["method"]: row for row in rows}
    pairs = [(bits / 2, found[f"polar-{bits}"], found[f"qamw-plain-{bits / 2:g}"]) for bits in range(6, 13)
             if f"polar-{bits}" in found and f"qamw-plain-{bits / 2:g}" in found]
    return [(rate, polar["perplexity"]["change_percent"] - joint["perplexity"]["change_percent"], polar["kl"]["mean"] / joint["kl"]["mean"])
            for rate, polar, joint in pairs]


def plot(rows: list[Row], file: Path) -> None:
    """KL and perplexity change against the effective rate, a line for every family with several rates."""
    models = by_model(rows)
    figure = Figure(figsize=(6.5 * len(models), 9), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False)
    for column, (model, own) in enumerate(models.items()):
        for family in dict.fromkeys(row["family"] for row in own if row["method"] != "bf16"):
            line = sorted((row for row in own if row["family"] == family), key=lambda row: row["effective_bits_per_weight"])
            rates = [row["effective_bits_per_weight"] for row in line]
            style = {"marker": "o", "label": family, "linewidth": 2.5 if family == "qamw" else 1}
            axes[0][column].plot(rates, [row["kl"]["mean"] for row in line], **style)
            axes[1][column].plot(rates, [max(row["perplexity"]["change_percent"], 0.01) for row in line], **style)
        for axis, name in zip(axes[:, column], ("mean KL divergence, nats", "perplexity change, % (at least 0.01)"), strict=True):
            axis.set(title=model, xlabel="effective bits per weight", ylabel=name, yscale="log", xlim=(2.9, 8.6))
            axis.grid(True, which="both", alpha=0.3)
        axes[0][column].legend(fontsize="small")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    rows = load_rows()
    for model, own in by_model(rows).items():
        print(f"## {model}: {own[0]['convention']}, {own[0]['perplexity']['num_windows']} windows\n\n{table(own)}\n")
        for rate, points, ratio in joint_against_polar(own):
            print(f"joint against polar at {rate:g} bpw: {points:+.2f} points of perplexity change saved, KL {ratio:.2f} times smaller")
        if len(own) > 3:
            print(f"Spearman of KL and perplexity change over {len(own) - 1} rows: {divergence_predicts_perplexity(own):.4f}\n")
    if rows:
        print(f"over all {len(rows)} rows: {divergence_predicts_perplexity(rows):.4f}")
        plot(rows, RESULTS / "rates.png")


if __name__ == "__main__":
    main()
