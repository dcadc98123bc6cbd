"""Write docs/architectures.md from records: ``python -m tests.architectures.table RECORDS...``.

If several files have the same stage, the last one counts. ``--expect`` writes expected.json
instead: how the stages of these architectures are expected to end from now on.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tests.architectures.outcomes import EXPECTED, Record, expectations, read_records

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
COLUMNS = {
    "offline": ("build", "plan", "none", "dequantize"),
    "calibrated": ("calibrated",),
    "transformers": ("transformers",),
    "vLLM": ("plain", "vllm"),
    "tensor parallel": ("tensor_parallel",),
    "while loading": ("uncalibrated", "loading"),
}
"""Column -> the stages behind it: the first one that did not pass is shown."""
INTRODUCTION = """# Architectures

Each architecture is tested with a tiny random checkpoint, written by transformers.
`make test-architectures` takes it through every stage on the CPU and writes this page.

- offline: planned, quantized without calibration, verified, dequantized, read by transformers
- calibrated: quantized with a few tokens, verified
- transformers: `from_pretrained` computes the same with the quantized checkpoint as with the
  dequantized one
- vLLM: the CPU engine computes the same with the quantized checkpoint as with the dequantized one;
  models that read images are given only text, except that qwen2_vl is also given an image
- tensor parallel: on each of two ranks, vLLM's model class loads from the quantized checkpoint, bit
  for bit, the weights that it loads from the dequantized one
- while loading: the CPU engine quantizes the plain checkpoint, and computes the same as above

"n/a": it does not work without this project either. "–": not reached, because an earlier stage did
not pass. "not run": that stage was left out. "16 bits": the share of the weights in the decoder's
matrices that are not quantized.

"""
WORDS = {"passed": "yes", "refused": "refused", "failed": "**fails**", "not applicable": "n/a"}


def page(records: Iterable[Record]) -> str:
    """The page in Markdown: a table, and the reasons of the stages that do not pass."""
    rows, reasons = [], []
    for record in sorted(records, key=lambda record: record.architecture):
        share = "" if record.kept_share is None else f"{record.kept_share:.1%}"
        cells = [record.architecture, *(cell(record, column) for column in COLUMNS), share]
        rows.append(f"| {' | '.join(cells)} |")
        reasons += [
            f"- {record.architecture}, {stage}: {' '.join(outcome.message.split())}"
            for stage, outcome in record.stages.items()
            if outcome.status != "passed"
        ]
    header = ["architecture", *COLUMNS, "16 bits"]
    table = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *rows]
    return INTRODUCTION + "\n".join([*table, "", "## Reasons", "", *reasons, ""])


def cell(record: Record, column: str) -> str:
    """What a column says of an architecture."""
    for stage in COLUMNS[column]:
        if stage not in record.stages:
            return "–" if record.is_blocked(stage) else "not run"
        if (status := record.stages[stage].status) != "passed":
            return WORDS[status]
    return WORDS["passed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--expect", action="store_true")
    args = parser.parse_args()
    records: dict[str, Record] = {}
    for record in (record for file in args.records for record in read_records(file)):
        earlier = records.get(record.architecture, Record(record.architecture))
        records[record.architecture] = record.after(earlier)
    if args.expect:
        expected = json.loads(EXPECTED.read_text()) | expectations(records.values())
        EXPECTED.write_text(f"{json.dumps(expected, indent=2)}\n")
    else:
        PAGE.write_text(page(records.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
