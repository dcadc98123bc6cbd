"""How much of the calibration text is read, and in which windows."""

import json
import os
from pathlib import Path

import pytest
import torch

from offline_quantize.calibration.text import (
    DEFAULT_TEXT,
    calibration_windows,
    default_num_tokens,
    spread_windows,
)
from offline_quantize.errors import QuantizeError
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.models import copy_model


def test_how_much_of_the_calibration_text_is_read(tmp_path: Path, tiny_llama: Path) -> None:
    assert (default_num_tokens(576), default_num_tokens(14336)) == (16384, 43008)
    assert calibration_windows(tiny_llama, DEFAULT_TEXT, 1000).shape == (2, 512)
    short = tmp_path / "short.txt"
    short.write_text(DEFAULT_TEXT.read_text()[:10000])
    whole = calibration_windows(tiny_llama, short, 100_000, at_least=512)
    again = calibration_windows(tiny_llama, short, whole.numel())
    assert 1 <= len(whole) < 20 and len(whole) == len(again)
    request = QuantizeRequest(calibration=short, calibration_tokens=100_000)
    with pytest.raises(QuantizeError, match=r"short.txt: \d+ tokens, at least \d{5,} are needed"):
        quantize(tiny_llama, tmp_path / "out", request)


def test_windows_have_the_asked_length(tiny_llama: Path) -> None:
    windows = calibration_windows(tiny_llama, DEFAULT_TEXT, 1000, window_tokens=128)
    assert windows.shape == (8, 128) and windows.dtype == torch.int64
    assert (windows[:, 0] == 1).all()  # BOS


def test_batches_are_of_the_whole_text(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "text").write_text("".join(f"{letter * 4000}\n" for letter in "abcdefgh"))
    windows = calibration_windows(tiny_llama, tmp_path / "text", 8 * 512)
    letters = [window.mode().values.item() for window in windows]
    assert len(set(letters)) == 8
    assert letters == [sorted(letters)[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]


def test_windows_of_a_long_text_are_whole() -> None:
    """Float32 has not every integer above 2**24."""
    tokens = torch.arange(2**24 + 515)
    windows = spread_windows(tokens, [], 32)
    assert windows.shape == (32, 512) and windows[0, 0] == 0 and windows[-1, -1] == tokens[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text: No such file or directory"),
        (b"\xff\xfe", "text: 'utf-8' codec can't decode byte 0xff"),
        (b"too short", r"text: \d tokens, at least 1022 are needed$"),
    ],
)
def test_texts_that_cannot_be_used(
    tmp_path: Path, tiny_llama: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(QuantizeError, match=message):
        calibration_windows(tiny_llama, tmp_path / "text", 1000)


def test_a_short_text_names_the_way_out(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "text").write_text("too short")
    with pytest.raises(QuantizeError, match=r"unless calibration_tokens has a smaller value$"):
        calibration_windows(tiny_llama, tmp_path / "text", 1000, at_least=512)


def test_a_model_without_tokenizer_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"(?s)no usable tokenizer.*Or use calibration=None$"):
        calibration_windows(tmp_path, DEFAULT_TEXT, 1000)


def test_an_empty_vocabulary_is_not_blamed_on_the_text(tmp_path: Path, tiny_llama: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tmp_path / "text"
    text.write_text("a text")
    message = "model: its tokenizer finds no tokens in .*text: is its vocabulary empty"
    with pytest.raises(QuantizeError, match=message):
        calibration_windows(model, text, 1000)


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja"])
def test_files_of_gigabytes_are_not_read(file: str, tmp_path: Path, tiny_llama: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    (model / file).touch()
    os.truncate(model / file, 10**10)
    with pytest.raises(QuantizeError, match=f"{file}: 10000000000 bytes, expected at most"):
        calibration_windows(model, DEFAULT_TEXT, 1000)
