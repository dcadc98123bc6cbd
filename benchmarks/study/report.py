"""The study's tables, plot and checks of the paper's claims, made from results/*.jsonl.

``make study-report``, or ``python -m benchmarks.study.report``: writes results/README.md,
results/rates.png, results/kl_by_bits.png for the project's README and, between two markers, the
tables of README and of docs/quality.md. No model is run.
"""

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from offline_quantize.calibration.text import DEFAULT_TEXT
from qamw_kernels.files import sha256_of

WITHIN = 0.4  # percent of perplexity, the paper's claim for about 5.5 bits per weight
RESULTS = Path(__file__).with_name("results")
SQNR_FILE = RESULTS / "trellis.json"  # of benchmarks/study/trellis.py
ROOT = Path(__file__).parents[2]
README, QUALITY = ROOT / "README.md", ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- study -->\n", "<!-- /study -->"
README_MODEL = "smollm2-135m"
README_METHODS = {
    "int8": "int8, one scale for each output",
    "int6-g64": "int6, groups of 64",
    "gguf-q5_k_m": "llama.cpp Q5_K_M",
    "qamw-6": "**QAM-W, 6 bits**",
    "qamw-5.5": "**QAM-W, 5.5 bits**",
    "qamw-trellis-5.5": "**QAM-W, 5.5 bits, `--code trellis`**",
}
README_FAMILIES = {
    "qamw": ("QAM-W", "left"),
    "llama.cpp": ("llama.cpp", "right"),
    "RTN g64": ("integers, groups of 64", "right"),
    "Hadamard, GPTQ g64": ("integers, rotated, GPTQ", "right"),
    "GPTQ g128": ("GPTQ, groups of 128", "above"),
    "SmoothQuant W8A8": ("SmoothQuant", "below"),
    "int8 per channel": ("int8", "below"),
}
"""Families in the plot of the project's README -> their name there, and its place (PLACES)."""
PLACES = {
    "left": ("right", (-10, -12)),
    "right": ("left", (10, -5)),
    "above": ("center", (0, 10)),
    "below": ("center", (0, -20)),
}
"""Alignment of a name, and its offset from a point."""
METHODS = (
    *("int8", "smoothquant", "int6-g64", "hadamard-int6-g64", "hadamard-gptq-int6-g64"),
    *("int5-g64", "int4-g64", "gptq-int4-g128", "gguf-q5_k_m", "polar-11", "qamw-plain-5.5"),
    *("qamw-best-trellis-6", "qamw-trellis-6", "qamw-best-6", "qamw-6"),
    *("qamw-best-trellis-5.5", "qamw-trellis-5.5", "qamw-both-trellis-5.5"),
    *("qamw-best-5.5", "qamw-5.5", "qamw-both-5.5"),
    *("qamw-5", "qamw-4.5", "qamw-best-4", "qamw-trellis-4", "qamw-4", "qamw-3.5"),
)
COLORS = {
    "qamw": "tab:red",
    "qamw-best": "darkred",
    "qamw-beam": "salmon",
    "qamw-mlp": "peru",
    "qamw-plain": "tab:orange",
    "qamw-both": "tab:brown",
    "qamw-trellis": "magenta",
    "qamw-best-trellis": "purple",
    "qamw-both-trellis": "violet",
    "qamw-feedback": "tab:pink",
    "qamw-scales": "gold",
    "rotated polar": "tab:olive",
    "rotated scalar": "tab:green",
    "int8 per channel": "black",
    "SmoothQuant W8A8": "tab:gray",
    "RTN g64": "tab:blue",
    "RTN g128": "tab:cyan",
    "GPTQ g128": "navy",
    "Hadamard, RTN g64": "skyblue",
    "Hadamard, RTN g128": "turquoise",
    "Hadamard, GPTQ g64": "royalblue",
    "Hadamard, GPTQ g128": "slateblue",
    "llama.cpp": "tab:purple",
}
"""The color of a family, the same in every panel."""
COLUMNS = (
    *("method", "effective bpw", "perplexity", "change, %", "mean KL", "of int8's", "99.9 % KL"),
    "same top-1, %",
)
FRONTIER = "frontier"
Row = dict[str, Any]
"""What run.py writes to results/MODEL.jsonl."""
TEXT_HASH = sha256_of(DEFAULT_TEXT)
OUTDATED = " †"


def load_rows(directory: Path = RESULTS) -> list[Row]:
    """All rows, by model and then in the order in which the study made them."""
    return [
        json.loads(line)
        for file in sorted(directory.glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]


def is_outdated(row: Row) -> bool:
    """Whether it was calibrated with another text than the current default one."""
    return row["calibration"] not in (None, TEXT_HASH)


def mark_of(row: Row) -> str:
    """The mark after its name or its figures: empty, unless it is outdated."""
    return OUTDATED if is_outdated(row) else ""


def load_codes() -> list[Row]:
    """The rows of SQNR_FILE."""
    codes: list[Row] = json.loads(SQNR_FILE.read_text())
    return codes


def by_model(rows: list[Row]) -> dict[str, list[Row]]:
    """Name of a model -> its rows."""
    return {model: list(group) for model, group in groupby(rows, lambda row: row["model"])}


def effective_rate(row: Row) -> float:
    """Effective bits per weight."""
    return float(row["effective_bits_per_weight"])


def change_with_error(row: Row) -> str:
    """The change of perplexity in percent with its standard error; bf16 has no error."""
    perplexity = row["perplexity"]
    error = perplexity["change_percent_se"] or 0
    return f"{perplexity['change_percent']:+.2f} ± {error:.2f}"


def line_of(cells: list[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def windows_of(model: str, rows: list[Row]) -> str:
    """A model and how much text it was measured on."""
    return f"{model}, {rows[0]['perplexity']['num_windows']} windows"


def table(rows: list[Row]) -> str:
    """A Markdown table of one model's rows, by effective rate."""
    int8 = next((row["kl"]["mean"] for row in rows if row["method"] == "int8"), None)
    lines = [line_of(list(COLUMNS)), "|---" * len(COLUMNS) + "|"]
    for row in sorted(rows, key=lambda row: (effective_rate(row), row["method"])):
        divergence = row["kl"]
        cells = [
            row["method"] + mark_of(row),
            f"{effective_rate(row):.3f}",
            f"{row['perplexity']['quantized']:.3f}",
            change_with_error(row),
            f"{divergence['mean']:.4f}",
            f"{divergence['mean'] / int8:.2f}" if int8 else "",
            f"{divergence['percentile_99_9']:.3f}",
            f"{100 * divergence['top1_agreement']:.1f}",
        ]
        lines.append(line_of(cells))
    return "\n".join(lines)


def divergence_predicts_perplexity(rows: list[Row]) -> float:
    """Spearman's rank correlation of KL and perplexity change over all quantized rows."""
    quantized = [row for row in rows if row["method"] != "bf16"]
    divergences = [row["kl"]["mean"] for row in quantized]
    changes = [row["perplexity"]["change_percent"] for row in quantized]
    return float(spearmanr(divergences, changes).statistic)


def joint_against_polar(rows: list[Row]) -> list[tuple[float, float, float]]:
    """How the joint codebook compares with polar coding at the same rate, without calibration.

    Returns:
        For every rate that both were measured at: (bits per weight, points of perplexity change
        that the joint codebook saves, KL of polar coding over KL of the joint codebook).
    """
    found = {row["method"]: row for row in rows}
    comparisons = []
    for index_bits in range(6, 13):
        rate = index_bits / 2
        polar, joint = found.get(f"polar-{index_bits}"), found.get(f"qamw-plain-{rate:g}")
        if polar is None or joint is None:
            continue
        saved = polar["perplexity"]["change_percent"] - joint["perplexity"]["change_percent"]
        comparisons.append((rate, saved, polar["kl"]["mean"] / joint["kl"]["mean"]))
    return comparisons


def frontier(rows: list[Row]) -> list[Row]:
    """The rows of one model that no other one beats in both rate and KL, by effective rate."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (effective_rate(row), row["kl"]["mean"])):
        if not best or row["kl"]["mean"] < best[-1]["kl"]["mean"]:
            best.append(row)
    return best


def plot(rows: list[Row], file: Path) -> None:
    """KL and perplexity change against the effective rate, a color for every family."""
    models = by_model(rows)
    figure = Figure(figsize=(5 * len(models), 9), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False)
    labels = ("mean KL divergence to bf16, nats", "perplexity change, % (at least 0.01)")
    lines = {}
    for column, (model, own) in enumerate(models.items()):
        for family in dict.fromkeys(row["family"] for row in own if row["method"] != "bf16"):
            line = sorted((row for row in own if row["family"] == family), key=effective_rate)
            rates = [effective_rate(row) for row in line]
            changes = [max(row["perplexity"]["change_percent"], 0.01) for row in line]
            width = 3 if family == "qamw" else 1.2
            style = {"marker": "o", "color": COLORS[family], "linewidth": width}
            lines[family], *_ = axes[0][column].plot(
                rates, [row["kl"]["mean"] for row in line], **style
            )
            axes[1][column].plot(rates, changes, **style)
        best = frontier([row for row in own if row["method"] != "bf16"])
        lines[FRONTIER], *_ = axes[0][column].plot(
            [effective_rate(row) for row in best],
            [row["kl"]["mean"] for row in best],
            color="0.85",
            linewidth=12,
            zorder=0,
        )
        for axis, label in zip(axes[:, column], labels, strict=True):
            axis.set(title=model, xlabel="effective bits per weight", yscale="log")
            axis.set(ylabel=label if column == 0 else None, xlim=(2.9, 8.6))
            axis.grid(True, which="both", alpha=0.3)
    families = [family for family in (*COLORS, FRONTIER) if family in lines]
    handles = [lines[family] for family in families]
    figure.legend(handles, families, loc="outside lower center", ncols=6, fontsize="large")
    figure.savefig(file, dpi=90, metadata={"Software": None})


def plot_readme(rows: list[Row], file: Path) -> None:
    """KL against the effective rate on one model, few families, readable on a phone."""
    own = [row for row in rows if row["model"] == README_MODEL]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for family, (name, side) in README_FAMILIES.items():
        line = sorted((row for row in own if row["family"] == family), key=effective_rate)
        points = [(effective_rate(row), row["kl"]["mean"]) for row in line]
        width = 4 if family == "qamw" else 2
        axis.plot(*zip(*points, strict=True), "o-", color=COLORS[family], linewidth=width)
        alignment, offset = PLACES[side]
        axis.annotate(
            name,
            points[len(points) // 2] if side == "left" else points[-1],
            offset,
            textcoords="offset points",
            ha=alignment,
            color=COLORS[family],
            fontsize="large",
        )
    axis.set(yscale="log", xlim=(2.9, 8.7), ylim=(0.002, 0.7))
    axis.set_title(f"{README_MODEL}, WikiText-2")
    axis.set_xlabel("effective bits per weight", fontsize="large")
    axis.set_ylabel("mean KL divergence to bf16, nats", fontsize="large")
    axis.grid(True, which="major", alpha=0.4)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def claims(rows: list[Row]) -> str:
    """The paper's claims that the rows can judge, in lines of Markdown."""
    models = by_model(rows)
    comparisons = [
        (model, *figures) for model, own in models.items() for figures in joint_against_polar(own)
    ]
    points = [saved for _, _, saved, _ in comparisons]
    lines = [
        "- *At equal rate, the joint codebook beats polar coding by 2 to 15 points of perplexity "
        f"change.* It is better in {sum(p > 0 for p in points)} of {len(points)} comparisons, "
        f"by 2 to 15 points in {sum(2 <= p <= 15 for p in points)} of them:"
    ]
    lines += [
        f"  - {model}, {rate:g} bpw: {saved:.2f} points; its KL is {ratio:.2f} times smaller"
        for model, rate, saved, ratio in comparisons
    ]
    lines.append(
        "- *KL predicts the perplexity change, with a rank correlation of 0.99.* Spearman's over "
        f"all quantized rows: {divergence_predicts_perplexity(rows):.4f}"
    )
    default = {row["model"]: row for row in rows if row["method"] == "qamw-5.5"}
    changes = [row["perplexity"]["change_percent"] for row in default.values()]
    within = sum(abs(change) <= WITHIN for change in changes)
    figures = (
        f"{model} {change_with_error(row)} %{mark_of(row)}" for model, row in default.items()
    )
    lines.append(
        f"- *About 5.5 bits per weight stay within {WITHIN} % of bf16.* "
        f"On {within} of {len(default)} models: {', '.join(figures)}"
    )
    return "\n".join(lines)


def readme_table(rows: list[Row]) -> str:
    """Some methods on one model, for the project's README."""
    found = {row["method"]: row for row in rows if row["model"] == README_MODEL}
    lines = [
        "| | bits per weight | perplexity change, % | mean KL to bf16, nats |",
        "|---|---|---|---|",
    ]
    for method, name in README_METHODS.items():
        row = found[method]
        cells = [f"{effective_rate(row):.2f}", change_with_error(row), f"{row['kl']['mean']:.4f}"]
        lines.append(line_of([name, *cells]))
    return "\n".join(lines)


def quality_table(rows: list[Row]) -> str:
    """Methods against models, for docs/quality.md."""
    models = by_model(rows)
    found = {(row["model"], row["method"]): row for row in rows}

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        rate, divergence = effective_rate(row), row["kl"]["mean"]
        return f"{rate:.2f} bpw: {change_with_error(row)} %, {divergence:.4f}{mark_of(row)}"

    lines = [
        line_of(["method", *(windows_of(model, own) for model, own in models.items())]),
        "|---" * (len(models) + 1) + "|",
    ]
    for method in METHODS:
        if any((model, method) in found for model in models):
            lines.append(line_of([method, *(cell(found.get((m, method))) for m in models)]))
    return "\n".join(lines)


def sqnr_table(rows: list[Row]) -> str:
    """Codes against bits per weight, from the rows of SQNR_FILE: dB on the unit normal."""
    rates = sorted({row["index_bits"] for row in rows})
    found = {(row["code"], row["index_bits"]): f"{row['sqnr_db']:.2f}" for row in rows}
    lines = [
        line_of(["code", *(f"{bits / 2:g} bits" for bits in rates)]),
        "|---" * (len(rates) + 1) + "|",
    ]
    for code in dict.fromkeys(row["code"] for row in rows):
        lines.append(line_of([code, *(found[code, bits] for bits in rates)]))
    bounds = (f"{10 * bits * math.log10(2):.2f}" for bits in rates)
    return "\n".join([*lines, line_of(["Shannon's bound", *bounds])])


def with_table(page: str, table_of_rows: str) -> str:
    """The text of a page with the table between its markers replaced."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}{table_of_rows}\n{END}{after}"


def results_page(rows: list[Row], codes: list[Row]) -> str:
    """The text of results/README.md from the study's rows and those of SQNR_FILE."""
    parts = [
        "# Results of the study",
        "Written by `make study-report` from the rows in `*.jsonl`, which `make study` makes "
        f"({rows[0]['convention']}, test split of WikiText-2, weights decoded to bfloat16).",
        "![KL and perplexity change against the rate](rates.png)",
        "## Claims",
        claims(rows),
    ]
    for model, own in by_model(rows).items():
        parts += [f"## {windows_of(model, own)}", table(own)]
    if any(map(is_outdated, rows)):
        parts.append(f"{OUTDATED.strip()} Calibrated with the text of an earlier version.")
    parts += [
        "## Codes of the unit normal",
        "Signal to noise ratio in dB, written by `python -m benchmarks.study.trellis`; standard "
        f"errors up to {max(row['sqnr_db_se'] for row in codes):.2f} dB. A word has 32 pairs; a "
        "row in which words go on has 32 words; a sequence of the scalar trellis has 256 weights, "
        "which alternate between the whole numbers of bits below and above a rate in half bits.",
        sqnr_table(codes),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    rows = load_rows()
    plot(rows, RESULTS / "rates.png")
    plot_readme(rows, RESULTS / "kl_by_bits.png")
    (RESULTS / "README.md").write_text(results_page(rows, load_codes()))
    README.write_text(with_table(README.read_text(), readme_table(rows)))
    QUALITY.write_text(with_table(QUALITY.read_text(), quality_table(rows)))


if __name__ == "__main__":
    main()
