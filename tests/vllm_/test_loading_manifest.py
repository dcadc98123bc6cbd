"""Checkpoints that are compared with their manifest before they are served."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from qamw_kernels.errors import FileError, FormatError
from qamw_kernels.format.index import INDEX
from qamw_kernels.format.manifest import MANIFEST
from qamw_vllm.config import QamwConfig
from qamw_vllm.loading.manifest import check_checkpoint
from tests.helpers.checkpoints import sign
from tests.offline.interruptions import file_size_limit
from tests.vllm_.layers import make_config

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SERVED = 5  # files of the checkpoint below


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A signed directory; what its files hold makes no difference here."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for file in (*SHARDS, INDEX, "config.json", "tokenizer.json", "README.md", "qamw_report.json"):
        (directory / file).write_text(f"content of {file}")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"weight": SHARDS[0]}}))
    (directory / "config.json").write_text(json.dumps({"quantization_config": {}}))
    sign(directory)
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def flip(path: Path) -> None:
    """Change one bit, with the time of modification as before."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_are_hashed_once(checkpoint: Path, cache: Path) -> None:
    first, second = check_checkpoint(checkpoint, cache), check_checkpoint(checkpoint, cache)
    assert (first.num_files, first.num_hashed, second.num_hashed) == (SERVED, SERVED, 0)
    assert str(second) == f"5 files, 0.00 GB: they match {MANIFEST} (checked before)"
    assert [path.suffix for path in cache.glob("*.json")] == [".json"]
    os.utime(checkpoint / "tokenizer.json")  # touched, with the same content
    assert check_checkpoint(checkpoint, cache).num_hashed == 1


def test_processes_that_start_together_hash_each_file_once(checkpoint: Path, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        checks = list(pool.map(lambda _: check_checkpoint(checkpoint, cache), range(4)))
    assert sum(checked.num_hashed for checked in checks) == SERVED


@pytest.mark.parametrize("damage", ["", "[]", '{"directory": 1}', "known to be right"])
def test_damaged_cache_means_hashing_again(checkpoint: Path, cache: Path, damage: str) -> None:
    check_checkpoint(checkpoint, cache)
    (remembered,) = cache.glob("*.json")
    remembered.write_text(damage)
    assert check_checkpoint(checkpoint, cache).num_hashed == SERVED
    known = json.loads(remembered.read_text())
    known["files"] = {file: {"sha256": 5, "bytes": []} for file in known["files"]}
    remembered.write_text(json.dumps(known))
    assert check_checkpoint(checkpoint, cache).num_hashed == SERVED
    assert check_checkpoint(checkpoint, cache).num_hashed == 0


def test_without_a_cache_files_are_hashed_every_time(checkpoint: Path, cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert check_checkpoint(checkpoint, cache).num_hashed == SERVED
    assert check_checkpoint(checkpoint, cache).num_hashed == SERVED


def test_a_full_disk_means_hashing_again_and_is_left_clean(checkpoint: Path, cache: Path) -> None:
    with file_size_limit(512):
        assert check_checkpoint(checkpoint, cache).num_hashed == SERVED
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert check_checkpoint(checkpoint, cache).num_hashed == SERVED


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: flip(d / SHARDS[1]), f"{SHARDS[1]}: SHA-256 .*, {MANIFEST} says"),
        (lambda d: flip(d / "config.json"), "config.json: SHA-256"),
        (lambda d: flip(d / "tokenizer.json"), "tokenizer.json: SHA-256"),
        (lambda d: os.truncate(d / SHARDS[0], 9), f"{SHARDS[0]}: 9 bytes, {MANIFEST} says 43"),
        (lambda d: (d / SHARDS[0]).unlink(), f"{SHARDS[0]}: missing"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (lambda d: (d / "adapter.safetensors").touch(), "adapter.safetensors: not in"),
        (lambda d: os.rename(d / SHARDS[0], d / "x.safetensors"), "x.safetensors: not in"),
    ],
)
def test_changes_are_refused(
    checkpoint: Path, cache: Path, change: Callable[[Path], object], message: str
) -> None:
    check_checkpoint(checkpoint, cache)  # known to be right, before it changes
    change(checkpoint)
    for _ in range(2):
        with pytest.raises(FileError, match=message) as error:
            check_checkpoint(checkpoint, cache)
    text = str(error.value)
    assert text.startswith(f"{checkpoint}: changed since it was quantized:\n  ")
    assert f"'qamw verify --sign {checkpoint}'" in text and "QAMW_VERIFY=0" in text


@pytest.mark.parametrize(
    "weight_map, error, message",
    [
        ({"weight": "more/x.safetensors"}, FileError, f"{INDEX}: more/x.safetensors is not in"),
        ({"weight": "config.json"}, FormatError, f"{INDEX}: weight_map names 'config.json'"),
        ({"weight": "../x.safetensors"}, FormatError, f"{INDEX}: weight_map names '../x"),
        ({"weight": None}, FormatError, f"{INDEX}: weight_map names None"),
    ],
)
def test_an_index_that_was_signed_must_name_files_that_are_listed(
    checkpoint: Path, cache: Path, weight_map: object, error: type[Exception], message: str
) -> None:
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    sign(checkpoint)
    with pytest.raises(error, match=message):
        check_checkpoint(checkpoint, cache)


def test_a_key_that_is_there_twice(checkpoint: Path, cache: Path) -> None:
    """vLLM reads config.json itself, and takes the last: also of what somebody signed so."""
    doubled = '{"vocab_size": 8, "text_config": {"index_bits": 6, "index_bits": 12}}'
    (checkpoint / "config.json").write_text(doubled)
    sign(checkpoint)
    message = "config.json: the key 'index_bits' is there 2 times"
    with pytest.raises(FileError, match=message):
        check_checkpoint(checkpoint, cache)
    with pytest.raises(FileError, match=message):  # of a plain checkpoint
        QamwConfig().maybe_update_config(str(checkpoint))
    manifest = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(manifest[:-1] + ', "files": {}}')
    with pytest.raises(FileError, match=f"{MANIFEST}: the key 'files' is there 2 times"):
        check_checkpoint(checkpoint, cache)


def test_many_changes_are_counted(checkpoint: Path, cache: Path) -> None:
    for number in range(20):
        (checkpoint / f"{number:02}.safetensors").touch()
    with pytest.raises(FileError, match=r"07\.safetensors: not in .*\n  and 12 more\n"):
        check_checkpoint(checkpoint, cache)


def test_what_vllm_reads_by_name_must_be_listed(checkpoint: Path, cache: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"]["config.json"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FileError, match=f"config.json: not in {MANIFEST}"):
        check_checkpoint(checkpoint, cache)


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "generation_config.json", "1_Pooling/config.json", "x.model"]
)
def test_what_is_read_if_it_is_there_must_be_listed(
    checkpoint: Path, cache: Path, file: str
) -> None:
    """A template that was added changes every answer."""
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).touch()
    with pytest.raises(FileError, match=f"{file}: not in {MANIFEST}"):
        check_checkpoint(checkpoint, cache)
    sign(checkpoint)
    check_checkpoint(checkpoint, cache)


def test_what_no_model_is_read_from_need_not_be_listed(checkpoint: Path, cache: Path) -> None:
    for file in ("notes.md", "run.log", ".cache/huggingface/x.json", ".git/config.json"):
        (checkpoint / file).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / file).touch()
    assert check_checkpoint(checkpoint, cache).num_files == SERVED


def test_manifest_is_needed(checkpoint: Path, cache: Path) -> None:
    (checkpoint / MANIFEST).write_text('{"manifest_version": 2, "files": {}}')
    with pytest.raises(FormatError, match="manifest_version 2 is not supported"):
        check_checkpoint(checkpoint, cache)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(FileError, match=f"no {MANIFEST}.*'qamw verify --sign"):
        check_checkpoint(checkpoint, cache)


def test_documentation_may_be_edited(checkpoint: Path, cache: Path) -> None:
    (checkpoint / "README.md").write_text("Another text")
    (checkpoint / "qamw_report.json").unlink()
    assert check_checkpoint(checkpoint, cache).num_files == SERVED


def test_cache_of_the_hub_may_lack_what_vllm_does_not_fetch(checkpoint: Path, cache: Path) -> None:
    snapshot = checkpoint.parent / "snapshots" / "0123"
    snapshot.parent.mkdir()
    checkpoint.rename(snapshot)
    (snapshot / "tokenizer.json").unlink()
    assert check_checkpoint(snapshot, cache).num_files == SERVED - 1
    (snapshot / SHARDS[0]).unlink()
    with pytest.raises(FileError, match=f"{SHARDS[0]}: missing"):
        check_checkpoint(snapshot, cache)


def test_vllm_has_directories_checked_before_it_starts_workers(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(cache))
    config = make_config("decode")
    config.maybe_update_config(str(checkpoint), hf_config=None, revision=None)
    assert log_lines[-1].startswith("QAM-W: 5 files, 0.00 GB")
    flip(checkpoint / SHARDS[0])
    with pytest.raises(FileError, match="changed since it was quantized"):
        config.maybe_update_config(str(checkpoint))
    QamwConfig().maybe_update_config(str(checkpoint))  # a plain checkpoint has no manifest
    config.maybe_update_config("organization/model")  # its loader checks it
    monkeypatch.setenv("QAMW_VERIFY", "0")
    config.maybe_update_config(str(checkpoint))
    monkeypatch.delenv("QAMW_VERIFY")
    for shard in SHARDS:
        (checkpoint / shard).unlink()
    config.maybe_update_config(str(checkpoint))  # for random weights
