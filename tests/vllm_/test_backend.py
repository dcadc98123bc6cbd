"""The choice of what runs."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from qamw_vllm.backend import BackendError, choose_backend


def platform(name: str) -> Any:
    return SimpleNamespace(
        is_cpu=lambda: name == "cpu",
        is_cuda=lambda: name == "cuda",
        device_name=name,
    )


def test_cpu_backend_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = platform("cpu")
    monkeypatch.delenv("QAMW_CPU_BACKEND", raising=False)
    assert choose_backend(platform=cpu, interpreted=False) == "decode"
    for way in ("argument", "environment"):
        own = "fast" if way == "argument" else None
        monkeypatch.setenv("QAMW_CPU_BACKEND", "decode" if own else "fast")
        with pytest.raises(BackendError, match="must be 'decode' or 'triton', got 'fast'"):
            choose_backend(own, cpu, interpreted=False)
        own = "triton" if way == "argument" else None
        monkeypatch.setenv("QAMW_CPU_BACKEND", "decode" if own else "triton")
        with pytest.raises(BackendError, match="set TRITON_INTERPRET=1"):
            choose_backend(own, cpu, interpreted=False)
        assert choose_backend(own, cpu, interpreted=True) == "triton"
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert choose_backend(own, cpu) == "triton"
        monkeypatch.delenv("TRITON_INTERPRET")


def test_other_platforms() -> None:
    assert choose_backend(platform=platform("cuda")) == "triton"
    with pytest.raises(BackendError, match="qamw runs on CUDA and on the CPU, not on tpu"):
        choose_backend(platform=platform("tpu"))
