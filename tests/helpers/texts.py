"""The text that tests evaluate models on."""

from pathlib import Path

EVALUATION_TEXT = Path(__file__).parents[1] / "data" / "evaluation.txt"
