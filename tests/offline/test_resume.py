"""A run that was killed goes on, and ends in the same bytes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.files import LOCK, PROGRESS, SINGLE, STATE
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.files import TEMPORARY
from qamw_kernels.format.manifest import FileEntry, Manifest
from tests.helpers.checkpoints import SMALL_SHARDS, files_of
from tests.helpers.models import copy_model, tiny_model
from tests.offline.interruptions import Killed, counted_writes

PLAIN = QuantizeRequest(calibration=None, max_shard_bytes=SMALL_SHARDS)
CALIBRATED = QuantizeRequest(calibration_tokens=512, max_shard_bytes=SMALL_SHARDS)


def quantize_until(kill_at: int, model: Path, out: Path, request: QuantizeRequest) -> None:
    """Die once file number ``kill_at`` is written."""
    with counted_writes(out, kill_at, after_rename=True), pytest.raises(Killed):
        quantize(model, out, request)


@pytest.mark.slow
@pytest.mark.parametrize("after_rename", [False, True])
@pytest.mark.parametrize(
    "request_",
    [PLAIN, replace(CALIBRATED, window_tokens=128)],
    ids=["plain", "calibrated"],
)
def test_kill_and_resume_at_every_write(
    tmp_path: Path, tiny_llama: Path, request_: QuantizeRequest, after_rename: bool
) -> None:
    with counted_writes(tmp_path / "whole") as written:
        quantize(tiny_llama, tmp_path / "whole", request_)
    expected = files_of(tmp_path / "whole")
    assert len([file for file in written if file.endswith(".safetensors")]) >= 4
    # With calibration a run takes longer, so it is killed only where it differs: at its shards.
    calibrated = request_.calibration is not None
    points = [i for i, f in enumerate(written) if not calibrated or f.endswith(".safetensors")]
    for kill_at in points:
        out = tmp_path / f"killed-{kill_at}"
        with counted_writes(out, kill_at, after_rename), pytest.raises(Killed):
            quantize(tiny_llama, out, request_)
        finished = (out / "config.json").exists()
        assert finished == (after_rename and written[kill_at] == "config.json")
        # A run that was killed before it recorded progress is started again like a new one.
        quantize(tiny_llama, out, request_, resume=(out / PROGRESS).exists())
        assert files_of(out) == expected, f"killed at {written[kill_at]}"


@pytest.mark.slow
def test_sigkill_and_resume(tmp_path: Path) -> None:
    """A real process, really killed, on a model large enough to be caught in the middle."""
    model = tiny_model(
        tmp_path / "model",
        "llama",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=24,
    )
    request = QuantizeRequest(calibration=None, max_shard_bytes=4_000_000)
    script = (
        "import sys; from offline_quantize.pipeline import quantize; "
        "from offline_quantize.planning.request import QuantizeRequest; "
        "request = QuantizeRequest(calibration=None, max_shard_bytes=4_000_000); "
        "quantize(sys.argv[1], sys.argv[2], request)"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", script, model, out])
    while not list(out.glob("model-00002*")):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists()
    quantize(model, out, request, resume=True)
    quantize(model, tmp_path / "whole", request)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_resume_refuses_another_request(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "out"
    quantize_until(2, tiny_llama, out, PLAIN)
    changes = "another request: bpw was 5.5 and is 4.0; use the same request"
    with pytest.raises(QuantizeError, match=changes):
        quantize(tiny_llama, out, replace(PLAIN, bpw=4.0), resume=True)
    message = "already exists; it is unfinished: continue qamw quantize with resume=True"
    with pytest.raises(QuantizeError, match=message):
        quantize(tiny_llama, out, PLAIN)
    with pytest.raises(QuantizeError, match="nothing to resume"):
        quantize(tiny_llama, tmp_path / "nowhere", PLAIN, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"rates": "uniform"},
        {"encoder": "nearest"},
        {"calibration_tokens": 600},
        {"ignore": ["*.o_proj"]},
    ],
    ids=str,
)
def test_resume_refuses_another_calibration(
    tmp_path: Path, tiny_llama: Path, change: dict[str, Any]
) -> None:
    """Also at 6 bits, where mixed rates are all the same."""
    request = replace(CALIBRATED, bpw=6.0)
    quantize_until(2, tiny_llama, tmp_path / "out", request)
    with pytest.raises(QuantizeError, match="another request"):
        quantize(tiny_llama, tmp_path / "out", replace(request, **change), resume=True)


def test_resume_refuses_a_text_of_another_name(tmp_path: Path, tiny_llama: Path) -> None:
    assert CALIBRATED.calibration
    copy = tmp_path / "copy.txt"
    copy.write_bytes(CALIBRATED.calibration.read_bytes())
    quantize_until(2, tiny_llama, tmp_path / "out", CALIBRATED)
    with pytest.raises(QuantizeError, match="another request"):
        quantize(tiny_llama, tmp_path / "out", replace(CALIBRATED, calibration=copy), resume=True)


def test_a_damaged_finished_shard_is_written_again(tmp_path: Path, tiny_llama: Path) -> None:
    quantize(tiny_llama, tmp_path / "whole", PLAIN)
    quantize_until(5, tiny_llama, tmp_path / "out", PLAIN)
    shard = min((tmp_path / "out").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    quantize(tiny_llama, tmp_path / "out", PLAIN, resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_sensitivities_are_measured_once(tmp_path: Path, tiny_llama: Path) -> None:
    """They take half the time of a run, and a GPU would not measure the very same ones again."""
    stages: list[str] = []

    def note(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    quantize(tiny_llama, tmp_path / "whole", CALIBRATED, progress=note)
    assert set(stages) == {"hashing", "sensitivity", "quantizing"}
    quantize_until(4, tiny_llama, tmp_path / "out", CALIBRATED)
    stages.clear()
    quantize(tiny_llama, tmp_path / "out", CALIBRATED, resume=True, progress=note)
    assert set(stages) == {"quantizing"}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("ignored", [0, 1])
def test_a_layer_that_is_ignored_has_no_sensitivities(
    tmp_path: Path, tiny_llama: Path, ignored: int
) -> None:
    request = replace(CALIBRATED, ignore=[f"*.layers.{ignored}.*"], allow_partial=True)
    quantize(tiny_llama, tmp_path / "whole", request)
    quantize_until(4, tiny_llama, tmp_path / "out", request)
    quantize(tiny_llama, tmp_path / "out", request, resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_second_run_is_refused_and_names_the_first(tmp_path: Path, tiny_llama: Path) -> None:
    """Fresh or resumed, before any work; the first run is not disturbed."""
    out, refused = tmp_path / "out", []

    def start_another(stage: str, done: int, total: int) -> None:
        for resume in (False, True) if not refused else ():
            with pytest.raises(QuantizeError) as error:
                quantize(tiny_llama, out, PLAIN, resume=resume)
            refused.append(str(error.value))

    quantize(tiny_llama, out, PLAIN, progress=start_another)
    expected = f"{out}: another run (process {os.getpid()} on {socket.gethostname()} since 20"
    assert len(refused) == 2 and all(message.startswith(expected) for message in refused)
    assert verify(out) and not (out / LOCK).exists()


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path, tiny_llama: Path) -> None:
    """Its leftovers go; so they do where it had not promised anything yet."""
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import sys, time; from pathlib import Path\n"
        "from offline_quantize.output.lock import locked\n"
        "with locked(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    with pytest.raises(QuantizeError, match=f"process {process.pid} on"):
        quantize(tiny_llama, out, PLAIN)
    process.kill()
    process.communicate()
    assert (out / LOCK).exists()
    (out / f".qamw-1-dead{TEMPORARY}").touch()
    quantize(tiny_llama, out, PLAIN)
    assert verify(out) and not [path for path in out.iterdir() if path.name.startswith(".")]


def changed_model(tiny_llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model and an unfinished run of it."""
    model, out = copy_model(tiny_llama, tmp_path / "model"), tmp_path / "out"
    quantize_until(2, model, out, PLAIN)
    return model, out


def replace_keeping_time(file: Path, content: bytes) -> None:
    """As ``cp -p`` and ``rsync -t`` do."""
    times = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"]
)
def test_another_source_is_refused_by_name(tmp_path: Path, tiny_llama: Path, file: str) -> None:
    """Also with the same size and the same time of modification."""
    model, out = changed_model(tiny_llama, tmp_path)
    content = (model / file).read_bytes()
    replace_keeping_time(model / file, content[:-1] + b" ")
    with pytest.raises(QuantizeError, match=f"{file}: has other content than when the run started"):
        quantize(model, out, PLAIN, resume=True)
    replace_keeping_time(model / file, content)
    quantize(model, out, PLAIN, resume=True)
    quantize(model, tmp_path / "whole", PLAIN)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_source_that_was_only_touched_goes_on(tmp_path: Path, tiny_llama: Path) -> None:
    model, out = changed_model(tiny_llama, tmp_path)
    (model / SINGLE).touch()
    stages: set[str] = set()
    quantize(model, out, PLAIN, resume=True, progress=lambda stage, *_: stages.add(stage))
    assert stages == {"hashing", "quantizing"}
    sources = Manifest.read(out).sources
    assert sources == {file: FileEntry.of(model / file) for file in (SINGLE, "config.json")}


def test_a_file_that_came_or_went(tmp_path: Path, tiny_llama: Path) -> None:
    model, out = changed_model(tiny_llama, tmp_path)
    (model / "NOTICE").touch()
    with pytest.raises(QuantizeError, match="NOTICE: was not there when the run started"):
        quantize(model, out, PLAIN, resume=True)
    (model / "NOTICE").unlink()
    (model / "chat_template.jinja").unlink()
    with pytest.raises(QuantizeError, match=r"chat_template.jinja: was there when the run started"):
        quantize(model, out, PLAIN, resume=True)


@pytest.mark.parametrize("file", [SINGLE, "chat_template.jinja"])
def test_a_source_that_changes_during_the_run(tmp_path: Path, tiny_llama: Path, file: str) -> None:
    model, changed = copy_model(tiny_llama, tmp_path / "model"), []

    def change(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and not changed:
            changed.append(file)
            content = (model / file).read_bytes()
            replace_keeping_time(model / file, content[:-1] + bytes([content[-1] ^ 1]))

    with pytest.raises(QuantizeError, match=f"{file}: has other content than when the run started"):
        quantize(model, tmp_path / "out", PLAIN, progress=change)
    assert not (tmp_path / "out" / "config.json").exists()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "foreign": lambda content: b"something else",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_named(tmp_path: Path, tiny_llama: Path, damage: str) -> None:
    out = tmp_path / "out"
    quantize_until(2, tiny_llama, out, PLAIN)
    (out / PROGRESS).write_bytes(DAMAGES[damage]((out / PROGRESS).read_bytes()))
    with pytest.raises(QuantizeError, match=f"{PROGRESS}: .*start again in a new directory"):
        quantize(tiny_llama, out, PLAIN, resume=True)


def test_damaged_measurements_are_made_again(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = replace(CALIBRATED, window_tokens=128)
    quantize(tiny_llama, tmp_path / "whole", request)
    out = tmp_path / "out"
    quantize_until(3, tiny_llama, out, request)
    (out / STATE).write_bytes(DAMAGES["flipped"]((out / STATE).read_bytes()))
    quantize(tiny_llama, out, request, resume=True)
    assert f"{out / STATE} is damaged: sensitivities are measured again" in caplog.messages
    assert files_of(out) == files_of(tmp_path / "whole")
