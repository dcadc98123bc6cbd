"""Calibration texts: plain ones, and JSON Lines of texts and chats."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from offline_quantize.calibration.documents import as_texts, read_documents
from offline_quantize.calibration.text import DEFAULT_TEXT, calibration_windows
from offline_quantize.model.chat_template import render_chats
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


def texts_of(file: Path, model: Path, **changes: Any) -> list[str]:
    """As the model's tokenizer has them, with other attributes."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return as_texts(read_documents(file), tokenizer, model)


def test_chats_are_read_as_the_template_of_the_model_writes_them(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """With a separator between documents, and without BOS, which every window has."""
    file = write_lines(tmp_path / "a.jsonl", {"text": "A text.", "source": 1}, {"messages": CHAT})
    template = AutoTokenizer.from_pretrained(tiny_llama).chat_template
    expected = ["A text.\n\n", "<|user|>Hi<|end|><|assistant|>Hello\u2028there<|end|>"]
    assert texts_of(file, tiny_llama) == expected
    led = "{{ bos_token }}" + template
    assert texts_of(file, tiny_llama, chat_template=led) == expected
    each = template.replace("'<|'", "bos_token + '<|'")  # as SmolLM2, whose BOS begins messages
    assert texts_of(file, tiny_llama, chat_template=each)[1].count("<s>") == 2
    alone = write_lines(tmp_path / "alone.jsonl", {"messages": CHAT[:1]})
    assert texts_of(alone, tiny_llama, chat_template=each) == ["<s><|user|>Hi<|end|>"]


def test_templates_see_tools_and_all_of_a_message(tmp_path: Path, tiny_llama: Path) -> None:
    called = CHAT[0] | {"tool_calls": [{"name": "add"}]}
    file = write_lines(tmp_path / "a.jsonl", {"messages": [called], "tools": [{"name": "add"}]})
    template = "{{ tools[0].name }} {{ messages[0].tool_calls[0].name }}"
    assert texts_of(file, tiny_llama, chat_template=template) == ["add add"]


def test_chats_with_tools_may_have_a_template_of_their_own(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """Among others, in the order of the file."""
    with_tools = {"messages": CHAT, "tools": [{"name": "add"}]}
    file = write_lines(tmp_path / "a.jsonl", with_tools, {"text": "A text."}, {"messages": CHAT})
    templates = {"default": "none", "tool_use": "{{ tools[0].name }}"}
    texts = texts_of(file, tiny_llama, chat_template=templates)
    assert texts == ["add\n\n", "A text.\n\n", "none"]


def test_content_in_parts_and_none_beside_calls(tmp_path: Path, tiny_llama: Path) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    file = write_lines(
        tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": parts}, calls]}
    )
    template = "{% for m in messages %}[{{ m.role }} {{ m.content }}]{% endfor %}"
    seen = texts_of(file, tiny_llama, chat_template=template)
    assert seen == ["[user One\ntwo][assistant None]"]
    assert texts_of(file, tiny_llama, chat_template=None) == ["user: One\ntwo\n\nassistant: "]


def test_templates_have_no_clock_and_no_dice(tmp_path: Path, tiny_llama: Path) -> None:
    """Or a run could not be resumed on the next day."""
    file = write_lines(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 2)
    template = (
        "{{ strftime_now('%Y-%m-%d') }} {{ range(10**5) | random }} {{ messages[0].content }}"
    )
    first, second = texts_of(file, tiny_llama, chat_template=template)
    assert first.startswith("2026-01-01 ") and first == second + "\n\n"


def test_chats_without_a_template(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    plain = ["user: Hi\n\nassistant: Hello\u2028there"]
    assert texts_of(file, tiny_llama, chat_template=None) == plain
    assert "chats read as plain text: 1 of 1; " in caplog.text

    def none_here(tools: None) -> None:
        raise NotImplementedError  # as the tokenizers of mistral_common

    assert texts_of(file, tiny_llama, get_chat_template=none_here) == plain
    assert "has no chat template, or no default one" in caplog.text


@pytest.mark.parametrize(
    ("refusing", "why"),
    [
        ("{{ raise_exception('\x1b no system') }}", r"TemplateError: \x1b no system"),
        ("", "it writes nothing"),
        ("{{ 'a' * 10**6 }}", "it writes 1000000 characters, expected at most 6"),
        ("{{ '\ud800' }}", "UnicodeEncodeError"),
    ],
)
def test_only_what_a_template_refuses_is_read_without_it(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, refusing: str, why: str
) -> None:
    system = [{"role": "system", "content": "Be kind."}, *CHAT]
    file = write_lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": system})
    template = (
        "{% if messages[0].role == 'system' %}" + refusing + "{% else %}{{ messages }}{% endif %}"
    )
    templated, plain = texts_of(file, tiny_llama, chat_template=template)
    assert templated.startswith("[{'role': 'user'") and plain.startswith("system: Be kind.")
    assert f"plain text: 1 of 2; the chat template of {tiny_llama} refuses them" in caplog.text
    assert len(caplog.text) < 2000
    assert f"first {file}:2" in caplog.text and why in caplog.text and "\x1b" not in caplog.text


def test_templates_that_take_too_much_are_stopped() -> None:
    chats = [{"messages": CHAT, "tools": None}]
    message = r"^model: its chat template fails: "
    with pytest.raises(QamwError, match=message + r"the process ended .* 4\.0 GiB of memory"):
        render_chats("{{ 'a' * 10**10 }}", {}, chats, Path("model"))
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(QamwError, match=message + "it was stopped after 3 s"):
        render_chats(forever, {}, chats, Path("model"), base_seconds=3)


def test_what_templates_add_is_tried_too(tmp_path: Path, tiny_llama: Path) -> None:
    """The template writes what makes the tokenizer grow without end."""
    model = copy_model(tiny_llama, tmp_path / "model")
    steps = [("\u2603", "z"), *[("z", "z" * 1000)] * 5]
    replacing = [{"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in steps]
    content = json.loads((model / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": replacing}
    (model / "tokenizer.json").write_text(json.dumps(content))
    (model / "chat_template.jinja").write_text("\u2603 {{ messages[0].content }}")
    file = write_lines(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 40)
    with pytest.raises(
        QamwError, match=r"this tokenizer cannot tokenize .*Or use calibration=None"
    ):
        calibration_windows(model, file, 128, window_tokens=32)


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
        ('{"text": 3}', r'a\.jsonl:2: \{"text": 3\}, expected either "text", a string, or'),
        ('{"text": "a", "messages": []}', r"a\.jsonl:2: .*expected"),
        ('{"messages": []}', r"a\.jsonl:2: .*expected"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            r'a\.jsonl:2: message 1 is \{.*or null beside "tool_calls"',
        ),
        ('{"messages": [{"role": "user", "content": "a"}, 3]}', r"message 2 is 3, expected"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "parts of text"),
        (
            '{"messages": [{"role": "u", "content": ""}], "tools": 1}',
            r"tools are 1, expected a list",
        ),
        ('{"prompt": "a"}', r"a\.jsonl:2: .*expected"),
    ],
)
def test_lines_that_are_no_document(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(QamwError, match=message):
        read_documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_json_lines_go_by_their_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('\ufeff{"text": "fine"}\r\n\r\n')
    assert read_documents(tmp_path / name) == ["fine"]


def test_a_file_without_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(QamwError, match=r"a\.jsonl: empty, expected a document on every line"):
        read_documents(tmp_path / "a.jsonl")
