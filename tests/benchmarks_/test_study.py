"""The study's rows, and what its report makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import report
from benchmarks.study.run import study
from tests.helpers.models import tiny_model
from tests.helpers.texts import EVALUATION_TEXT


def test_rows_are_made_once(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", max_position_embeddings=2048)
    results, raw = tmp_path / "results", EVALUATION_TEXT.read_text()
    made = ["bf16", "int8", "qamw-plain-3.5", "qamw-feedback-4", "qamw-4.5"]
    for methods in (made[:3], made):  # the second run goes on
        study("tiny", model, raw, methods, num_windows=2, results=results)
    rows = report.load_rows(results)
    assert [row["method"] for row in rows] == made
    assert rows[0]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["perplexity"]["change_percent"] == pytest.approx(0, abs=1e-4)
    divergences = {row["method"]: row["kl"]["mean"] for row in rows}
    assert 0 < divergences["int8"] < divergences["qamw-4.5"] < divergences["qamw-plain-3.5"]
    assert all(row["kl"]["num_tokens"] == 2 * 2047 for row in rows)
    assert report.table(rows).count("\n") == len(rows) + 1
    assert report.table(rows).count(" | 1.00 | ") == 1  # int8 against itself
    assert report.table(rows[2:]).count(" |  | ") == len(rows) - 2  # not made yet
    report.plot(rows, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 10000
    calibrated = [row["method"] for row in rows if row["calibration"]]
    assert calibrated == ["qamw-feedback-4", "qamw-4.5"]
    outdated = [row | {"calibration": row["calibration"] and "another"} for row in rows]
    assert "| qamw-4.5 † |" in report.table(outdated) and "†" not in report.table(rows)
    (results / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in outdated))
    study("tiny", model, raw, ["int8", "qamw-4.5"], num_windows=2, results=results)
    *others, again = report.load_rows(results)
    assert others == outdated[:-1]
    assert again | {"quantize_seconds": 0, "evaluate_seconds": 0} == rows[-1] | {
        "quantize_seconds": 0,
        "evaluate_seconds": 0,
    }


def row(method: str, kl: float, change: float) -> dict[str, Any]:
    return {
        "method": method,
        "model": "one",
        "calibration": None,
        "kl": {"mean": kl},
        "perplexity": {"change_percent": change, "change_percent_se": 0.1},
    }


def test_claims_are_computed_from_rows() -> None:
    rows = [
        row("bf16", 0, 0),
        row("polar-8", 0.4, 50),
        row("qamw-plain-4", 0.2, 30),
        row("polar-9", 0.1, 35),
    ]
    assert report.joint_against_polar(rows) == [(4.0, 20, 2.0)]
    # Ranks 3 2 1 against 3 1 2.
    assert report.divergence_predicts_perplexity(rows) == pytest.approx(0.5)

    rows += [
        row("qamw-5.5", 0.01, 0.5),
        row("polar-7", 0.4, 50),
        row("qamw-plain-3.5", 0.5, 60),
    ]
    text = report.claims(rows)
    assert "It is better in 1 of 2 comparisons, by 2 to 15 points in 0 of them" in text
    assert "On 0 of 1 models: one +0.50 ± 0.10 %" in text


def test_frontier() -> None:
    """Fewest bits, and what has less KL than everything with as few bits."""
    rows = [
        row(name, kl, 0) | {"effective_bits_per_weight": rate}
        for name, rate, kl in [("d", 8, 0.1), ("c", 6, 0.3), ("b", 6, 0.2), ("a", 4, 0.2)]
    ]
    assert [r["method"] for r in report.frontier(rows)] == ["a", "d"]


def test_picture_of_readme(tmp_path: Path) -> None:
    report.plot_readme(report.load_rows(), tmp_path / "kl_by_bits.png")
    assert (tmp_path / "kl_by_bits.png").stat().st_size > 10000


def test_results_page_shows_the_rows() -> None:
    page = (report.RESULTS / "README.md").read_text()
    assert report.results_page(report.load_rows(), report.load_codes()) == page, "make study-report"


@pytest.mark.parametrize(
    ("page", "table"),
    [(report.README, report.readme_table), (report.QUALITY, report.quality_table)],
    ids=["readme", "quality"],
)
def test_page_shows_the_rows(page: Path, table: Callable[[list[report.Row]], str]) -> None:
    text = page.read_text()
    assert report.with_table(text, table(report.load_rows())) == text, "make study-report"
