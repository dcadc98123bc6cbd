"""The choice of what runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.errors import TensorError
from qamw_vllm.backend import BackendError, choose_backend, decode_rows


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


def test_values_that_the_dtype_cannot_hold_are_refused() -> None:
    quantized = encode_weight(torch.randn(8, 64), 11, 64, make_input_scales(64))
    quantized.row_norms[5] = 1e5
    assert decode_rows(quantized, torch.bfloat16, "layer").isfinite().all()
    message = r"layer: row 5 of this rank, of norm 1e\+05, decodes to values that torch.float16"
    with pytest.raises(TensorError, match=message):
        decode_rows(quantized, torch.float16, "layer")
