"""A run that was killed goes on, and ends in the same bytes."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offline_quantize.errors import QuantizeError
from offline_quantize.files import PROGRESS
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.checkpoints import SMALL_SHARDS, files_of
from tests.helpers.models import tiny_model
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
    # With calibration a run costs more, and differs only while shards are written.
    calibrated = request_.calibration is not None
    points = [i for i, f in enumerate(written) if not calibrated or f.endswith(".safetensors")]
    for kill_at in points:
        out = tmp_path / f"killed-{kill_at}"
        with counted_writes(out, kill_at, after_rename), pytest.raises(Killed):
            quantize(tiny_llama, out, request_)
        finished = (out / "config.json").exists()
        assert finished == (after_rename and written[kill_at] == "config.json")
        # Killed before its first promise, a run is started again like a new one.
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
    with pytest.raises(QuantizeError, match="another request"):
        quantize(tiny_llama, out, replace(PLAIN, bpw=4.0), resume=True)
    message = "already exists; it is unfinished: qamw quantize continues with resume=True"
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
    assert set(stages) == {"sensitivity", "quantizing"}
    quantize_until(4, tiny_llama, tmp_path / "out", CALIBRATED)
    stages.clear()
    quantize(tiny_llama, tmp_path / "out", CALIBRATED, resume=True, progress=note)
    assert set(stages) == {"quantizing"}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
