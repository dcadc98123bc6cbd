"""The choice of what runs."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from qamw_kernels.ops.gluon import table
from qamw_vllm import backend as backend_module
from qamw_vllm.backend import BackendError, choose_backend, describe_backend


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


def test_other_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(platform=platform("cuda")) == "triton"
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert choose_backend(platform=platform("cpu"), interpreted=False) == "decode"
    with pytest.raises(BackendError, match="VLLM_BATCH_INVARIANT=1: the kernels of qamw depend"):
        choose_backend(platform=platform("cuda"))
    with pytest.raises(BackendError, match="qamw runs on CUDA and on the CPU, not on tpu"):
        choose_backend(platform=platform("tpu"))


@pytest.mark.parametrize(
    ("gluon", "dtype", "message"),
    [
        (
            True,
            torch.bfloat16,
            "packed, for kernels in Gluon; .* .such as experts before compute capability 9.0",
        ),
        (True, torch.float32, "plain Triton kernels decode them, because .* torch.float32"),
        (False, torch.bfloat16, "plain Triton kernels decode them, because this Triton"),
    ],
)
def test_what_runs_on_a_gpu_is_described(
    gluon: bool, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "current_platform", platform("cuda"))
    monkeypatch.setattr(table, "HAS_GATHER", gluon)
    assert re.search(message, describe_backend("triton", dtype))
