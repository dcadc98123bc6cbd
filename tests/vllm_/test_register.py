"""How vLLM finds the plugin."""

import importlib.metadata
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization import get_quantization_config

import qamw_vllm
from qamw_vllm.config import QamwConfig

_LIGHT = """
import sys, qamw_vllm
assert "torch" not in sys.modules and "vllm" not in sys.modules
qamw_vllm.register()
import torch
assert not torch.cuda.is_initialized()
assert "qamw_vllm.config" in sys.modules
assert "qamw_kernels.ops.triton.kernels" not in sys.modules
assert "qamw_kernels.ops.triton.launch" not in sys.modules
assert "qamw_vllm.linear" not in sys.modules
"""


def test_entry_point_registers_and_may_run_again() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="qamw")
    register = entry.load()
    assert register is qamw_vllm.register
    register()
    register()
    assert get_quantization_config("qamw") is QamwConfig


def test_import_and_register_stay_light() -> None:
    """vLLM imports the plugin in every process.

    Importing pulls in no torch, registering no kernel and no CUDA.
    """
    subprocess.run([sys.executable, "-c", _LIGHT], check=True, timeout=300)
