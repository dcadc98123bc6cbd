"""A run that was killed goes on, and ends in the same bytes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.checkpoints import SMALL_SHARDS, files_of
from tests.helpers.models import tiny_model
from offline_quantize.errors import QuantizeError
from offline_quantize.output.directory import PROGRESS, Output
from offline_quantize.pipeline import quantize


class Killed(BaseException):
    """Not an Exception, so that no handler can keep it."""


def count_commits(monkeypatch: pytest.MonkeyPatch, kill_at: int | None, after_rename: bool) -> list[str]:
    """Die at the ``kill_at``-th write, before or after its rename; returns the list that collects what was written."""
    commit, written = Output._commit, []

    def dying_commit(self: Output, file: str, write):
        if len(written) == kill_at and not after_rename:
            write(self.directory / f"{file}.partial")
            raise Killed
        path = commit(self, file, write)
        written.append(file)
        if len(written) - 1 == kill_at:
            raise Killed
        return path

    monkeypatch.setattr(Output, "_commit", dying_commit)
    return written


@pytest.mark.slow
@pytest.mark.parametrize("after_rename", [False, True])
@pytest.mark.parametrize("calibrate", [False, True])
def test_kill_and_resume_at_every_write(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, calibrate: bool,
                                        after_rename: bool) -> None:
    from offline_quantize.calibration import hessians as cal

    monkeypatch.setattr(cal, "WINDOW_TOKENS", 128)
    options = {"max_shard_bytes": SMALL_SHARDS} | ({"calibration_tokens": 512} if calibrate else {"calibration": None})
    with monkeypatch.context() as patch:
        written = count_commits(patch, None, after_rename)
        quantize(tiny_llama, tmp_path / "whole", **options)
    expected = files_of(tmp_path / "whole")
    assert len([f for f in written if f.endswith(".safetensors")]) >= 4
    # With calibration a run costs more, and differs only while shards are written.
    points = [i for i, f in enumerate(written) if not calibrate or f.endswith(".safetensors")]
    for kill_at in points:
        out = tmp_path / f"killed-{kill_at}"
        with monkeypatch.context() as patch:
            count_commits(patch, kill_at, after_rename)
            with pytest.raises(Killed):
                quantize(tiny_llama, out, **options)
        finished = (out / "config.json").exists()
        assert finished == (after_rename and written[kill_at] == "config.json")
        # Killed before its first promise, a run is started again like a new one.
        quantize(tiny_llama, out, resume=(out / PROGRESS).exists(), **options)
        assert files_of(out) == expected, f"killed at {written[kill_at]}"


@pytest.mark.slow
def test_sigkill_and_resume(tmp_path: Path) -> None:
    """A real process, really killed, on a model large enough to be caught in the middle."""
    model = tiny_model(tmp_path / "model", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=24)
    out, script = tmp_path / "out", ("from offline_quantize.quantize import quantize; import sys; "
                                     "quantize(sys.argv[1], sys.argv[2], calibration=None, max_shard_bytes=4_000_000)")
    process = subprocess.Popen([sys.executable, "-c", script, model, out])
    while not list(out.glob("model-00002*")):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists()
    quantize(model, out, calibration=None, max_shard_bytes=4_000_000, resume=True)
    quantize(model, tmp_path / "whole", calibration=None, max_shard_bytes=4_000_000)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_resume_refuses_another_request(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        count_commits(patch, 2, True)
        with pytest.raises(Killed):
            quantize(tiny_llama, out, calibration=None, max_shard_bytes=SMALL_SHARDS)
    with pytest.raises(QuantizeError, match="another request"):
        quantize(tiny_llama, out, bpw=4.0, calibration=None, max_shard_bytes=SMALL_SHARDS, resume=True)
    with pytest.raises(QuantizeError, match="already exists; it is unfinished: qamw quantize continues with --resume"):
        quantize(tiny_llama, out, calibration=None)
    with pytest.raises(QuantizeError, match="nothing to resume"):
        quantize(tiny_llama, tmp_path / "nowhere", calibration=None, resume=True)


@pytest.mark.parametrize("change", [{"rates": "uniform"}, {"encoder": "nearest"}, {"calibration_tokens": 600}, {"ignore": ["*.o_proj"]}],
                         ids=str)
def test_resume_refuses_another_calibration(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    """Also at 6 bits, where mixed rates are all the same."""
    options = {"bpw": 6.0, "calibration_tokens": 512, "max_shard_bytes": SMALL_SHARDS}
    with monkeypatch.context() as patch:
        count_commits(patch, 2, True)
        with pytest.raises(Killed):
            quantize(tiny_llama, tmp_path / "out", **options)
    with pytest.raises(QuantizeError, match="another request"):
        quantize(tiny_llama, tmp_path / "out", resume=True, **options | change)


def test_a_damaged_finished_shard_is_written_again(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"calibration": None, "max_shard_bytes": SMALL_SHARDS}
    quantize(tiny_llama, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        count_commits(patch, 5, True)
        with pytest.raises(Killed):
            quantize(tiny_llama, tmp_path / "out", **options)
    shard = min((tmp_path / "out").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    quantize(tiny_llama, tmp_path / "out", resume=True, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_sensitivities_are_measured_once(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half the time of a run, and a GPU would not measure the very same ones again."""
    from offline_quantize import pipeline as module

    options = {"calibration_tokens": 512, "max_shard_bytes": SMALL_SHARDS}
    quantize(tiny_llama, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        count_commits(patch, 4, True)
        with pytest.raises(Killed):
            quantize(tiny_llama, tmp_path / "out", **options)
    monkeypatch.setattr(module, "measure_sensitivities", None)
    quantize(tiny_llama, tmp_path / "out", resume=True, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
