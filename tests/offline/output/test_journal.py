"""What an unfinished run remembers: all of it is believed, or nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offline_quantize.errors import QuantizeError
from offline_quantize.files import PROGRESS, STATE
from offline_quantize.model.sources import SourceFile
from offline_quantize.output.journal import HASHED, Journal
from qamw_kernels.files import Stamp
from qamw_kernels.format.manifest import FileEntry

ENTRY = FileEntry("0" * 64, 3)
JOURNAL = Journal(
    {"bpw": "5.5"},
    {"a": SourceFile(Stamp(3, 0, 1, 2, 3), "f" * 64)},
    ENTRY,
    {"b": ENTRY},
    {"b": [0.1]},
)


def write(directory: Path, content: Any) -> None:
    (directory / PROGRESS).write_text(json.dumps(content))


def test_it_survives_json(tmp_path: Path) -> None:
    write(tmp_path, JOURNAL.to_dict())
    assert Journal.read(tmp_path) == JOURNAL


@pytest.mark.parametrize("key", list(JOURNAL.to_dict()))
@pytest.mark.parametrize("value", [None, 1, "x", {"a": 1}, []], ids=repr)
def test_damage_is_named(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path, JOURNAL.to_dict() | {key: value})
    with pytest.raises(QuantizeError, match=rf"{PROGRESS}: .*; start again in a new directory"):
        Journal.read(tmp_path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ({"bpw": "5"}, {"bpw": "6"}, "bpw was 5 and is 6;"),
        ({"a": "1", "b": "2"}, {"a": "x", "b": "y"}, "a was 1 and is x, b was 2 and is y;"),
        ({"a": "1", "file": f"{HASHED}0"}, {"a": "2", "file": f"{HASHED}1"}, "a was 1 and is 2;"),
        ({"file": f"{HASHED}0"}, {"file": f"{HASHED}1"}, "file is not the same;"),
        ({"the command": "x"}, {"the command": "y", "a": "1"}, "the command was x and is y;"),
    ],
)
def test_it_says_what_differs(old: dict[str, str], new: dict[str, str], message: str) -> None:
    Journal(old).require(Path("out"), dict(old))
    with pytest.raises(QuantizeError, match=f"^out: started from another request: {message}"):
        Journal(old).require(Path("out"), new)


def test_state_is_believed_whole_or_not_at_all(tmp_path: Path) -> None:
    assert Journal({}).read_state(tmp_path) == {}
    save_file({"a": torch.ones(3)}, tmp_path / STATE)
    journal = Journal({}, state=FileEntry.of(tmp_path / STATE))
    state = journal.read_state(tmp_path)
    assert state and torch.equal(state["a"], torch.ones(3))
    content = (tmp_path / STATE).read_bytes()
    for damaged in (content[:-1] + b"\1", content[:-1], content + b"\0", b"", b"foreign"):
        (tmp_path / STATE).write_bytes(damaged)
        assert journal.read_state(tmp_path) is None
    (tmp_path / STATE).unlink()
    assert journal.read_state(tmp_path) is None
