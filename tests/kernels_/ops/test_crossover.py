"""Up to how many tokens packed weights are multiplied, on GPUs that were measured and others."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qamw_kernels.ops import crossover
from qamw_kernels.ops.crossover import crossover_key, gemm_max_tokens, kernel_for_many
from qamw_kernels.ops.gluon import table
from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.weight import Rate

pytestmark = pytest.mark.skipif(not table.HAS_GATHER, reason="without it all kernels are plain")
GPU = torch.device("cuda", 0)
HOPPER, BLACKWELL = (Processor(132, 227 << 10, capability) for capability in (90, 100))
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU was measured, with the wide kernel and with the plain one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    measured = {crossover_key(GPU, "wide"): 300, crossover_key(GPU, "plain"): 5}
    (tmp_path / "crossover.json").write_text(json.dumps(measured))
    monkeypatch.setattr(crossover, "CROSSOVER_FILE", tmp_path / "crossover.json")
    gemm_max_tokens.cache_clear()
    yield
    gemm_max_tokens.cache_clear()


@pytest.mark.parametrize(
    "dtype, processor, kernel, most",
    [
        (BF16, HOPPER, "wide", 300),
        (torch.float16, HOPPER, "wide", 300),
        (BF16, BLACKWELL, "decode", 16),  # not measured with this kernel
        (BF16, None, "plain", 5),
        (FP32, HOPPER, "plain", 16),  # measured in 16 bits only
    ],
)
def test_a_measurement_is_of_a_gpu_and_a_kernel(
    dtype: torch.dtype, processor: Processor | None, kernel: str, most: int
) -> None:
    assert kernel_for_many(dtype, Rate(11), processor) == kernel
    assert gemm_max_tokens(GPU, dtype, Rate(11), processor) == most


def test_other_gpus_have_the_limits_of_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert gemm_max_tokens(GPU, BF16, Rate(11), HOPPER) == 1024
    assert gemm_max_tokens(GPU, BF16, Rate(11), BLACKWELL) == 16
    assert gemm_max_tokens(torch.device("cpu"), BF16, Rate(11), HOPPER) == 1024
