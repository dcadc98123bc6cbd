"""The output directory: whole files, progress, and what it refuses."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_quantize.errors import QuantizeError
from offline_quantize.files import CONFIG, LOCK, PROGRESS, STATE
from offline_quantize.output.directory import Output
from offline_quantize.output.journal import Journal
from qamw_kernels.files import TEMPORARY, write_atomically
from qamw_kernels.format.index import INDEX
from qamw_kernels.format.manifest import MANIFEST, FileEntry, Manifest
from tests.offline.interruptions import file_size_limit

TENSORS = {"a": torch.arange(4.0)}


def unfinished(directory: Path, **options: Any) -> Output:
    """An output that was begun with a request of its own."""
    directory.mkdir(exist_ok=True)
    return Output(directory, Journal({}), **options)


def test_finished_output_has_a_manifest_and_no_progress(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sources = {"model.safetensors": FileEntry("0" * 64, 7)}
    with Output.reserved(out, tmp_path / "model", resume=False):
        output = Output(out, Journal({}), TENSORS)
        output.write_shard("model.safetensors", TENSORS, {"note": 1})
        output.write_bytes("folder/file.txt", b"text")
        output.finish({"a": "model.safetensors"}, 16, {"model_type": "tiny"}, sources)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "folder/file.txt", INDEX, MANIFEST, CONFIG}
    manifest = Manifest.read(out)
    assert manifest.sources == sources and set(manifest.files) == files - {MANIFEST}
    for file, entry in manifest.files.items():
        assert entry == FileEntry.of(out / file)


def test_progress_is_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = unfinished(out, state=TENSORS)
    output.write_shard("1.safetensors", TENSORS, ["note"])
    output.write_shard("2.safetensors", TENSORS, ["damaged"])
    (out / "2.safetensors").write_bytes(b"?")
    before = Journal.read(out)
    state = before.read_state(out)
    assert state and torch.equal(state["a"], TENSORS["a"])
    again = unfinished(out, state=state, unfinished=before)
    assert set(again.journal.files) == {"1.safetensors"}
    assert again.journal.notes == {"1.safetensors": ["note"]}
    assert torch.equal(again.read_shard("1.safetensors", ["a"])["a"], TENSORS["a"])


def test_shards_belong_to_what_was_measured(tmp_path: Path) -> None:
    """Measured again with another result, all of them are written again."""
    unfinished(tmp_path, state=TENSORS).write_shard("1.safetensors", TENSORS, None)
    other = {"a": TENSORS["a"] + 1}
    again = unfinished(tmp_path, state=other, unfinished=Journal.read(tmp_path))
    assert again.journal.files == {}
    # With other rates there may be another number of shards: none of the old ones is left over.
    assert not list(tmp_path.glob("*.safetensors"))
    assert (tmp_path / STATE).exists()


def test_who_is_unfinished_says_how_to_go_on(tmp_path: Path) -> None:
    output = unfinished(tmp_path)
    message = "too-large: File too large; when this is fixed, resume=True continues"
    with file_size_limit(1000), pytest.raises(QuantizeError, match=message):
        output.write_bytes("too-large", bytes(2000))
    output = unfinished(tmp_path, resumable=False)
    with file_size_limit(1000), pytest.raises(QuantizeError, match=r"too-large: File too large$"):
        output.write_bytes("too-large", bytes(2000))


def test_targets_that_are_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    Output.check_target(out, source, resume=False)
    for left in (f".qamw-1{TEMPORARY}", LOCK, STATE):  # killed before anything was promised
        (out / left).touch()
    Output.check_target(out, source, resume=False)
    with pytest.raises(QuantizeError, match="nothing to resume, the directory holds no unfinished"):
        Output.check_target(out, source, resume=True)
    with pytest.raises(QuantizeError, match="nothing to resume, the directory does not exist"):
        Output.check_target(tmp_path / "absent", source, resume=True)
    (out / CONFIG).touch()
    with pytest.raises(QuantizeError, match="nothing to resume, the directory is finished"):
        Output.check_target(out, source, resume=True)
    with pytest.raises(QuantizeError, match="already exists, a new or empty directory"):
        Output.check_target(out, source, resume=False)
    (out / PROGRESS).touch()
    Output.check_target(out, source, resume=True)
    with pytest.raises(QuantizeError, match=r"it is unfinished: .* resume=True"):
        Output.check_target(out, source, resume=False)
    with pytest.raises(QuantizeError, match="must not be the model's own directory"):
        Output.check_target(source / "out", source, resume=False)


def test_a_link_to_nothing_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "absent")
    with pytest.raises(QuantizeError, match=r"out: a link to .*absent, which does not exist"):
        Output.check_target(tmp_path / "out", tmp_path / "model", resume=False)


def test_who_may_read(tmp_path: Path) -> None:
    """A report of figures follows the umask; a checkpoint, which is served, can always be read."""
    umask = os.umask(0o077)
    try:
        write_atomically(tmp_path / "figures.json", lambda path: path.write_text("{}"))
        (tmp_path / "out").mkdir()
        output = Output(tmp_path / "out", Journal({}))
        output.write_shard("model.safetensors", {"x": torch.zeros(1)}, None)
    finally:
        os.umask(umask)
    assert (tmp_path / "figures.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_files_of_others_are_not_taken_for_leftovers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.partial").touch()
    with pytest.raises(QuantizeError, match="a new or empty directory was expected"):
        Output.check_target(out, tmp_path / "model", resume=False)
