"""Tokenizers that would take the process with them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from offline_quantize.cli import main
from offline_quantize.errors import QuantizeError
from offline_quantize.model.tokenizer import load_tokenizer
from tests.helpers.models import copy_model

THOUSAND = {"type": "Replace", "pattern": {"String": "z"}, "content": "z" * 1000}
GROWING = {"type": "Sequence", "normalizers": [THOUSAND] * 5}


@pytest.fixture
def growing(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer makes a thousand of every z, five times."""
    model = copy_model(tiny_llama, tmp_path / "growing")
    content: dict[str, Any] = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(content | {"normalizer": GROWING}))
    return model


def test_only_a_text_that_ends_the_process_is_refused(growing: Path, tiny_llama: Path) -> None:
    expected = load_tokenizer(tiny_llama, ["text"])("some text")["input_ids"]
    assert load_tokenizer(growing, ["some text"])("some text")["input_ids"] == expected
    message = r"tokenizer.json: this tokenizer cannot tokenize 4 bytes of text: .*SIGABRT"
    with pytest.raises(QuantizeError, match=message):
        load_tokenizer(growing, ["zoo\n"])


def test_one_that_does_not_stop_is_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "slow")
    content: dict[str, Any] = json.loads((model / "tokenizer.json").read_text())
    same = {"type": "Replace", "pattern": {"String": "z"}, "content": "z"}
    normalizer = {"type": "Sequence", "normalizers": [same] * 100_000}
    (model / "tokenizer.json").write_text(json.dumps(content | {"normalizer": normalizer}))
    message = r"tokenizer.json: this tokenizer cannot tokenize 9000 bytes of text: it was stopped"
    with pytest.raises(QuantizeError, match=message):
        load_tokenizer(model, ["z" * 9000], base_seconds=3)


def test_commands_end_with_one_message(
    growing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("a zebra. " * 2000)
    quantize = ["quantize", str(growing), str(out), "--calibration", str(text)]
    assert main([*quantize, "--calibration-tokens", "512"]) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].endswith(". Or use --calibration none")
    assert f"{growing / 'tokenizer.json'}: this tokenizer cannot" in printed and not out.exists()
    assert main(["eval", str(growing), "--reference", str(growing), "--text", str(text)]) == 2
    assert "this tokenizer cannot tokenize" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_wrong_otherwise_is_said_by_transformers(growing: Path) -> None:
    (growing / "tokenizer.json").write_text("{}")
    with pytest.raises(QuantizeError, match=r"growing: no usable tokenizer.*\(.+\)"):
        load_tokenizer(growing, ["zoo"])
    os.remove(growing / "tokenizer.json")
    with pytest.raises(QuantizeError, match=r"is tokenizer\.json there"):
        load_tokenizer(growing, ["zoo"])
