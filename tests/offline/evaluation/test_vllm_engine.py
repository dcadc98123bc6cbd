"""Evaluation through vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offline_quantize.evaluation.conventions import CONVENTIONS
from offline_quantize.evaluation.vllm_engine import environment_defaults
from tests.offline.evaluation.texts import RAW


def test_environment_is_changed_for_the_time_of_the_engine_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QAMW_TEST_SET", "by the user")
    monkeypatch.delenv("QAMW_TEST_UNSET", raising=False)
    before = dict(os.environ)
    with (
        pytest.raises(KeyError, match="ends it early"),
        environment_defaults({"QAMW_TEST_SET": "ours", "QAMW_TEST_UNSET": "ours"}),
    ):
        assert os.environ["QAMW_TEST_SET"] == "by the user"
        assert os.environ["QAMW_TEST_UNSET"] == "ours"
        raise KeyError("ends it early")
    assert dict(os.environ) == before


@pytest.mark.engine
def test_vllm_engine_measures_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Through the command, in a process of its own: vLLM's figures are those of transformers."""
    pytest.importorskip("vllm")
    model, quantized = pair
    text = tmp_path / "text.txt"
    text.write_text(RAW, encoding="utf-8")
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    figures = []
    for engine in ("transformers", "vllm"):
        report = tmp_path / f"{engine}.json"
        command = [sys.executable, "-m", "offline_quantize", "eval", quantized]
        command += ["--reference", model, "--text", text, "--dtype", "float32"]
        command += ["--windows", "2", "--noise-windows", "0"]
        command += ["--engine", engine, "--json", report]
        subprocess.run(command, env=environment, check=True, timeout=500)
        figures.append(json.loads(report.read_text())["checkpoints"][0])
    decoded, served = figures
    for name in CONVENTIONS:
        expected = pytest.approx(decoded["perplexity"][name]["quantized"], rel=1e-3)
        assert served["perplexity"][name]["quantized"] == expected, name
    assert served["kl"]["mean"] == pytest.approx(decoded["kl"]["mean"], rel=1e-2)
