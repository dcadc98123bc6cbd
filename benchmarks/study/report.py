"""What the study says, all from results/*.jsonl: tables, a plot, and checks of the paper's claims, in results/README.md, and the table
of the project's README. ``make study-report``; no quantisation is done.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

WITHIN = 0.4  # percent of perplexity, the paper's claim for about 5.5 bits per weight
RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parents[2] / "README.md"
IN_README = ("int8", "smoothquant", "int6-g64", "int5-g64", "int4-g64", "gptq-int4-g128", "gguf-q5_k_m", "polar-11", "qamw-plain-5.5",
             "qamw-6", "qamw-5.5", "qamw-5", "qamw-4.5", "qamw-4", "qamw-3.5")
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


def claims(rows: list[Row]) -> str:
    """The paper's claims that the rows can judge, in lines of Markdown."""
    pairs = [(model, *figures) for model, own in by_model(rows).items() for figures in joint_against_polar(own)]
    points = [figures[2] for figures in pairs]
    lines = [f"- *At equal rate, the joint codebook beats polar coding by 2 to 15 points of perplexity change.* Its order holds in "
             f"{sum(p > 0 for p in points)} of {len(points)} comparisons, its size in {sum(2 <= p <= 15 for p in points)}:"]
    lines += [f"  - {model}, {rate:g} bpw: {saved:.2f} points; its KL is {ratio:.2f} times smaller" for model, rate, saved, ratio in pairs]
    lines.append(f"- *KL predicts the perplexity change, with a rank correlation of 0.99.* Spearman's over all quantised rows: "
                 f"{divergence_predicts_perplexity(rows):.4f}")
    changes = {row["model"]: row["perplexity"] for row in rows if row["method"] == "qamw-5.5"}
    within = [model for model, p in changes.items() if abs(p["change_percent"]) <= WITHIN]
    lines.append(f"- *About 5.5 bits per weight stay within {WITHIN} % of bf16.* On {len(within)} of {len(changes)} models: " + ", ".join(
        f"{model} {p['change_percent']:+.2f} ± {p['change_percent_se']:.2f} %" for model, p in changes.items()))
    return "\n".join(lines)


def readme_table(rows: list[Row]) -> str:
    """Methods against models, for the project's README."""
    models = by_model(rows)
    lines = ["| method | " + " | ".join(f"{model}, {own[0]['perplexity']['num_windows']} windows" for model, own in models.items()) + " |",
             "|---" * (len(models) + 1) + "|"]
    found = {(row["model"], row["method"]): row for row in rows}

    def cell(row: Row | None) -> str:
        return "" if row is None else (f"{row['effective_bits_per_weight']:.2f} bpw: {row['perplexity']['change_percent']:+.2f} "
                                       f"± {row['perplexity']['change_percent_se'] or 0:.2f} %, {row['kl']['mean']:.4f}")

    lines += [f"| {method} | " + " | ".join(cell(found.get((model, method))) for model in models) + " |"
              for method in IN_README if any((model, method) in found for model in models)]
    return "\n".join(lines)


def with_table(readme: str, rows: list[Row]) -> str:
    """The text of the project's README with its table made anew."""
    before, rest = readme.split("<!-- study -->\n")
    return f"{before}<!-- study -->\n{readme_table(rows)}\n<!-- /study -->{rest.split('<!-- /study -->')[1]}"


def main() -> None:
    rows = load_rows()
    plot(rows, RESULTS / "rates.png")
    parts = [f"# Results of the study\n\nWritten by `make study-report` from the rows in `*.jsonl`, which `make study` makes "
             f"({rows[0]['convention']}, test split of WikiText-2, weights decoded to bfloat16).",
             "![KL and perplexity change against the rate](rates.png)",
             f"## Claims\n\n{claims(rows)}"]
    parts += [f"## {model}, {own[0]['perplexity']['num_windows']} windows\n\n{table(own)}" for model, own in by_model(rows).items()]
    (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")
    README.write_text(with_table(README.read_text(), rows))


if __name__ == "__main__":
    main()
