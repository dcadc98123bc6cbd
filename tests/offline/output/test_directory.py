"""The output directory: whole files, progress, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from offline_quantize.errors import QuantizeError
from offline_quantize.files import CONFIG, INDEX, PROGRESS, STATE
from offline_quantize.output.directory import Output
from qamw_kernels.files import sha256_of
from qamw_kernels.format.manifest import MANIFEST

TENSORS = {"a": torch.arange(4.0)}


def test_finished_output_has_a_manifest_and_no_progress(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = Output(out, "request", resume=False)
    output.keep_state(TENSORS)
    output.write_shard("model.safetensors", TENSORS, {"note": 1})
    output.write_bytes("folder/file.txt", b"text")
    output.finish({"a": "model.safetensors"}, 16, {"model_type": "tiny"})
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "folder/file.txt", INDEX, MANIFEST, CONFIG}
    manifest = json.loads((out / MANIFEST).read_text())["files"]
    assert set(manifest) == files - {MANIFEST}
    for file, entry in manifest.items():
        expected = {"sha256": sha256_of(out / file), "bytes": (out / file).stat().st_size}
        assert entry == expected


def test_progress_is_taken_up(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", "request", resume=False)
    output.keep_state(TENSORS)
    output.write_shard("1.safetensors", TENSORS, ["note"])
    output.write_shard("2.safetensors", TENSORS, ["damaged"])
    (tmp_path / "out" / "2.safetensors").write_bytes(b"?")
    (tmp_path / "out" / "3.safetensors.partial").touch()
    again = Output(tmp_path / "out", "request", resume=True)
    assert set(again.files) == {"1.safetensors"} and again.notes == {"1.safetensors": ["note"]}
    assert torch.equal(again.read_shard("1.safetensors", ["a"])["a"], TENSORS["a"])
    assert torch.equal(Output.kept_state(tmp_path / "out")["a"], TENSORS["a"])
    assert not list((tmp_path / "out").glob("*.partial"))
    with pytest.raises(QuantizeError, match="another request"):
        Output(tmp_path / "out", "other", resume=True)


def test_targets_that_are_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    Output.check_target(out, source, resume=False)
    (out / f"{PROGRESS}.partial").touch()  # killed before anything was promised
    Output.check_target(out, source, resume=False)
    with pytest.raises(QuantizeError, match="nothing to resume, the directory holds no unfinished"):
        Output.check_target(out, source, resume=True)
    with pytest.raises(QuantizeError, match="nothing to resume, the directory is not there"):
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


def test_no_state_is_kept_where_none_was_written(tmp_path: Path) -> None:
    Output(tmp_path / "out", "request", resume=False)
    assert Output.kept_state(tmp_path / "out") == {} and not (tmp_path / "out" / STATE).exists()
