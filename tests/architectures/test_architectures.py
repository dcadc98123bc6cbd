"""All architectures of configs.json end as expected.json says: neither worse nor better.

An architecture that gets further than before is reported too: its entries in expected.json are then
removed, or written anew with ``python -m tests.architectures.table RECORDS --expect``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from qamw_kernels.errors import TensorError
from tests.architectures.build import architectures
from tests.architectures.outcomes import (
    EXPECTED,
    NotApplicable,
    Outcome,
    Record,
    differences,
    expectations,
    outcome_of,
    read_records,
)
from tests.architectures.run import perform, run
from tests.architectures.serving import Engine
from tests.architectures.stages import Offline
from tests.architectures.table import COLUMNS, cell, page
from tests.architectures.vision import import_torchvision
from tests.helpers.house import ROOT
from tools.attack.isolated import run_isolated

# Some of the architectures that pass and that no other test uses.
CROSS_SECTION = [
    *("qwen3_next", "glm4_moe", "minimax_m2", "granitehybrid", "lfm2_moe"),
    *("afmoe", "opt", "stablelm", "cohere2_moe", "minicpm3"),
]
UNCALIBRATED = ("build", "plan", "none", "dequantize", "transformers")
HALVES = (list(architectures())[::2], list(architectures())[1::2])
LIMIT = 3600  # seconds of one half


def expected() -> dict[str, dict[str, list[str]]]:
    """See ``differences``."""
    found: dict[str, dict[str, list[str]]] = json.loads(EXPECTED.read_text())
    return found


def test_every_architecture_has_an_expectation() -> None:
    assert set(expected()) == set(architectures())
    assert len(architectures()) >= 115
    assert set(CROSS_SECTION) <= set(architectures())


@pytest.mark.parametrize("name", CROSS_SECTION)
def test_cross_section(name: str, tmp_path: Path) -> None:
    record = Record(name)
    for stage in UNCALIBRATED:
        if record.reaches(stage):
            record.stages[stage], share = perform(name, stage, tmp_path)
            record.kept_share = record.kept_share if share is None else share
    assert differences([record], expected()) == []
    assert record.kept_share is not None and record.kept_share < 0.1


@cache
def half(index: int) -> dict[str, Record]:
    """The records of every second architecture, all run in one process beside this one."""
    file = ROOT / "build" / f"architectures-{index}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.architectures.run", str(file), *HALVES[index]]
    inherited = {name: value for name, value in os.environ.items() if "VLLM_" not in name}
    subprocess.run(command, cwd=ROOT, check=True, timeout=LIMIT, env=inherited)
    return {record.architecture: record for record in read_records(file)}


@pytest.mark.architectures
@pytest.mark.parametrize(
    ("index", "name"),
    [
        pytest.param(index, name, marks=pytest.mark.xdist_group(f"architectures-{index}"), id=name)
        for index, names in enumerate(HALVES)
        for name in names
    ],
)
def test_architecture(index: int, name: str) -> None:
    assert differences([half(index)[name]], expected()) == []


# --- the runner itself


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (TensorError("/here/model: no weight"), "refused", "model: no weight"),
        (NotApplicable("no such class"), "not applicable", "no such class"),
        (ValueError("of\nsome sort"), "failed", "ValueError: of some sort (test_architectures"),
    ],
)
def test_outcomes(error: Exception, status: str, message: str) -> None:
    outcome = outcome_of(lambda: fail(error), Path("/here"))
    assert outcome.status == status and outcome.message.startswith(message)


def test_better_and_worse_are_different() -> None:
    record = Record("a", {"plan": Outcome("passed"), "none": Outcome("failed", "why")})
    assert differences([record], expectations([record])) == []
    wanted = {"a": {"plan": ["refused", "because"]}}
    better, worse = differences([record], wanted)
    assert better == "a plan: passed, expected refused (because)"
    assert worse == "a none: failed, expected passed (why)"


def test_a_later_record_takes_the_place_of_stages_only() -> None:
    passed, failed = Outcome("passed"), Outcome("failed", "why")
    stages = dict.fromkeys(("build", "plan", "none", "dequantize"), passed)
    earlier = Record("a", {**stages, "transformers": passed, "plain": failed}, kept_share=0.1)
    both = Record("a", {**stages, "plain": passed}).after(earlier)
    assert both.stages == {**stages, "transformers": passed, "plain": passed}
    assert both.kept_share == 0.1
    worse = Record("a", {"build": passed, "plan": failed}).after(both)
    assert worse.stages == {"build": passed, "plan": failed, "plain": passed}


def test_one_that_dies_or_hangs_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(stages: Offline) -> None:
        if stages.architecture.name == "opt":
            os._exit(3)
        while stages.architecture.name == "bloom":
            pass

    monkeypatch.setattr(Offline, "build", build)
    monkeypatch.setattr(Offline, "plan", lambda stages: None)
    names, file = ["llama", "opt", "bloom", "mpt"], tmp_path / "records.jsonl"
    records = run(names, tmp_path, file, ["build", "plan"], limit=20)
    good = {"build": Outcome("passed"), "plan": Outcome("passed")}
    assert records[0].stages == records[3].stages == good
    died, hanging = (record.stages for record in records[1:3])
    assert died == {"build": Outcome("failed", "Died: the process ended: exit status 3")}
    assert hanging == {"build": Outcome("failed", "Hanging: more than 20 s")}
    assert [record.stages for record in read_records(file)] == [r.stages for r in records]


def test_every_engine_has_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(stages: Engine) -> None:
        with (tmp_path / "processes").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if stages.architecture.name == "opt":
            raise NotApplicable("no such engine")

    monkeypatch.setattr(Offline, "build", lambda stages: None)
    monkeypatch.setattr(Engine, "plain", plain)
    names, file = ["llama", "opt", "bloom"], tmp_path / "records.jsonl"
    records = run(names, tmp_path, file, ["build", "plain", "loading"], limit=20)
    statuses = [record.stages["plain"].status for record in records]
    assert statuses == ["passed", "not applicable", "passed"]
    assert len(set((tmp_path / "processes").read_text().split())) == 3


def test_torchvision_is_imported_without_its_operators(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    source = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda boxes: boxes)\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(source)

    def steps() -> Iterator[str | None]:
        import_torchvision(tmp_path / "absent")
        import_torchvision(tmp_path)
        yield sys.modules["torchvision"].__file__

    (found,) = run_isolated(steps, 60)
    assert Path(found).parent.parent == tmp_path


def test_table() -> None:
    stages = {"build": "passed", "plan": "passed", "none": "passed", "dequantize": "passed"}
    record = Record("a", {stage: Outcome("passed") for stage in stages}, kept_share=0.014)
    record.stages |= {"calibrated": Outcome("failed", "why"), "plain": Outcome("not applicable")}
    row = "| a | yes | **fails** | not run | n/a | not run | – | 1.4% |"
    assert row in page([record]) and "- a, calibrated: why" in page([record])
    built = Record("b", {"build": Outcome("passed")})
    assert [cell(built, column) for column in COLUMNS] == ["not run"] * 6
    refused = Record("c", {"build": Outcome("passed"), "plan": Outcome("refused", "why")})
    assert [cell(refused, column) for column in COLUMNS] == [
        "refused",
        "–",
        "–",
        "not run",
        "–",
        "–",
    ]
