"""Several processes, started by torchrun, that quantize one model together."""

import json
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest

from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.files import PROGRESS
from offline_quantize.pipeline import quantize
from offline_quantize.ranks import ALONE, Ranks, joined
from tests.helpers.checkpoints import decoded, files_of
from tests.helpers.house import ROOT
from tests.helpers.models import tiny_model
from tests.offline.ranks_script import REQUEST


def torchrun(processes: int, module: str, *arguments: Any) -> subprocess.Popen[str]:
    """Start a module in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", module, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def quantize_together(processes: int, model: Path, out: Path, *options: str) -> None:
    started = torchrun(processes, "tests.offline.ranks_script", model, out, *options)
    errors = started.communicate()[1]
    assert started.returncode == 0, errors
    assert verify(out)


def agree(one: Path, other: Path) -> None:
    """Check that two results differ only by the noise of sums in another order.

    Where this noise changes a codeword, the rest of the row compensates for it.
    """
    reports = [json.loads((out / "qamw_report.json").read_text()) for out in (one, other)]
    for a, b in zip(*(report["layers"] for report in reports), strict=True):
        assert (a["name"], a["index_bits"]) == (b["name"], b["index_bits"])
        assert b["nmse"] == pytest.approx(a["nmse"], rel=0.05)
        assert b["output_nmse"] == pytest.approx(a["output_nmse"], rel=0.05)
        weight = decoded(one, a["name"])
        difference = (decoded(other, a["name"]) - weight).square().sum() / weight.square().sum()
        assert difference < 2 * a["nmse"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with enough layers to be interrupted between two of them."""
    return tiny_model(tmp_path_factory.mktemp("ranks") / "model", "llama", num_hidden_layers=6)


@pytest.fixture(scope="session")
def by_two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model quantized by two processes; treat it as read-only."""
    out = tmp_path_factory.mktemp("ranks") / "by-two"
    quantize_together(2, model, out)
    return out


@pytest.mark.xdist_group("ranks")
def test_two_processes_agree_with_one(model: Path, by_two: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "by-one", REQUEST)
    agree(tmp_path / "by-one", by_two)


@pytest.mark.xdist_group("ranks")
def test_a_lost_process_ends_all_and_the_run_goes_on(
    model: Path, by_two: Path, tmp_path: Path
) -> None:
    """The result is that of a run that was not interrupted, byte for byte."""
    out = tmp_path / "out"
    started = torchrun(2, "tests.offline.ranks_script", model, out)
    while not list(out.glob("model-00001*")):
        assert started.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    workers = psutil.Process(started.pid).children()
    (second,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
    second.kill()
    errors = started.communicate(timeout=120)[1]
    assert started.returncode != 0, errors
    assert (out / PROGRESS).exists() and not (out / "config.json").exists()
    quantize_together(2, model, out, "--resume")
    assert files_of(out) == files_of(by_two)


@pytest.mark.xdist_group("ranks")
def test_what_is_refused_is_said_once(model: Path, by_two: Path) -> None:
    started = torchrun(2, "offline_quantize", "quantize", model, by_two, "--calibration", "none")
    errors = started.communicate(timeout=120)[1]
    assert started.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("qamw: ")]
    assert len(said) == 1 and "already exists" in said[0], errors


@pytest.mark.matrix
@pytest.mark.parametrize("architecture", ["qwen2", "mixtral"])
def test_three_processes_agree_with_one(architecture: str, tmp_path: Path) -> None:
    """There are tokens for two of them; experts are shared out."""
    model = tiny_model(tmp_path / "model", architecture)
    quantize(model, tmp_path / "by-one", REQUEST)
    quantize_together(3, model, tmp_path / "by-three")
    agree(tmp_path / "by-one", tmp_path / "by-three")


def test_one_gpu_for_several_processes_is_refused(model: Path, tmp_path: Path) -> None:
    message = "device='cuda:0': each of several processes has its own GPU, expected auto, cpu"
    with pytest.raises(QuantizeError, match=message):
        quantize(model, tmp_path / "out", REQUEST, device="cuda:0", ranks=Ranks(0, 2))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_items", "unit"), [(0, 1), (1, 1), (7, 1), (8, 4), (9, 4), (64, 4)])
def test_parts_are_all_in_order_and_alike(count: int, num_items: int, unit: int) -> None:
    items = list(range(num_items))
    parts = [items[Ranks(index, count).share(num_items, unit)] for index in range(count)]
    assert list(chain(*parts)) == items
    assert all(part[0] % unit == 0 for part in parts if part)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * unit - 1


def test_one_process_talks_to_nobody() -> None:
    with joined() as ranks:
        assert ranks is ALONE
    assert ALONE.first and ALONE.decide(lambda: 5) == 5 and ALONE.gather(6) == [6]
