"""Texts that the tests evaluate on, and the tokenizer that reads them."""

from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "data"
RAW = (DATA / "evaluation.txt").read_text(encoding="utf-8")[:7000]
PAGES = [
    ' = First page = \n \n It cost 1 @,@ 000 " dollars " ( or more ) . \n \n'
    " = = Section = = \n \n The end ; well @-@ known . \n ",
    " = Second page = \n \n He said 's N times : no . \n",
]


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)
