"""Calibration texts: plain ones, and JSON Lines of texts and chats."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from offline_quantize.calibration.documents import as_texts, read_documents
from offline_quantize.calibration.text import DEFAULT_TEXT, calibration_windows
from qamw_kernels.errors import QamwError
from tests.helpers.models import copy_model

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\u2028there"}]


def write_lines(path: Path, *documents: Any) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))
    return path


def test_the_default_text_has_prose_code_languages_and_chats() -> None:
    lines = [json.loads(line) for line in DEFAULT_TEXT.read_text().splitlines()]
    assert all(line["source"] and line["license"] for line in lines)
    documents = read_documents(DEFAULT_TEXT)
    assert len(documents) == len(lines) and sum(not isinstance(d, str) for d in documents) == 46
    languages = Counter(line.get("language") for line in lines)
    assert languages["en"] == 205 and len(languages) == 17
    assert sum("(Rust)" in line["source"] for line in lines) == 4


def test_chats_are_read_as_the_template_of_the_model_writes_them(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """With a separator between documents, and without BOS, which every window has."""
    file = write_lines(tmp_path / "a.jsonl", {"text": "A text.", "source": 1}, {"messages": CHAT})
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    chat = "<|user|>Hi<|end|><|assistant|>Hello\u2028there<|end|>"
    assert as_texts(read_documents(file), tokenizer) == ["A text.\n\n", chat]
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert as_texts(read_documents(file), tokenizer) == ["A text.\n\n", chat]
    each = tokenizer.chat_template.replace("{{ bos_token }}", "").replace(
        "'<|'", "bos_token + '<|'"
    )
    tokenizer.chat_template = each  # as SmolLM2, whose BOS begins every message
    assert as_texts(read_documents(file), tokenizer)[1].count("<s>") == 2


def test_chats_without_a_template(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = read_documents(write_lines(tmp_path / "a.jsonl", {"messages": CHAT}))
    plain = ["user: Hi\n\nassistant: Hello\u2028there"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    assert as_texts(documents, tokenizer) == as_texts(documents) == plain
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with caplog.at_level(logging.WARNING):
        assert as_texts(documents, tokenizer) == plain
    assert "chats are read as plain text: the template refuses one (no user)" in caplog.text


def test_chats_become_tokens_of_the_template(tmp_path: Path, tiny_llama: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    file = write_lines(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 40)
    tokens = calibration_windows(model, file, 128, window_tokens=32)
    assert (tokens == AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|end|>")).any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:2: Expecting property name"),
        ("[1]", r"a\.jsonl:2: expected a JSON object, got list"),
        ('{"text": 3}', r'a\.jsonl:2: \{"text": 3\}, expected "text", a string, or "messages"'),
        ('{"text": "a", "messages": []}', r"a\.jsonl:2: .*expected"),
        ('{"messages": []}', r"a\.jsonl:2: .*expected"),
        ('{"messages": [{"role": "user", "content": null}]}', r"a\.jsonl:2: .*both strings"),
        ('{"prompt": "a"}', r"a\.jsonl:2: .*expected"),
    ],
)
def test_lines_that_are_no_document(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(QamwError, match=message):
        read_documents(tmp_path / "a.jsonl")


def test_a_file_without_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(QamwError, match=r"a\.jsonl: empty, expected a document on every line"):
        read_documents(tmp_path / "a.jsonl")
