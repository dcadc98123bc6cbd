"""How quantized layers compute on this machine: the choice, its preparation, its description."""

import functools
import os
import time
from typing import TYPE_CHECKING, Literal

import torch
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.platforms import current_platform

from qamw_kernels.errors import QamwError
from qamw_kernels.format.config import QamwFormat
from qamw_kernels.ops.interpreter import interpreted as kernels_are_interpreted
from qamw_kernels.ops.weight import Rate

if TYPE_CHECKING:
    from vllm.platforms.interface import Platform

logger = init_logger(f"vllm.{__name__}")  # vLLM shows messages of loggers below its own name

Backend = Literal["triton", "decode"]
"""``triton``: weights stay packed, and kernels decode them. ``decode``: decoded while loading."""

CPU_BACKEND_VARIABLE = "QAMW_CPU_BACKEND"


class BackendError(QamwError, ValueError):
    """The platform, the vLLM release or the chosen backend is not supported."""


def choose_backend(
    cpu_backend: str | None = None,
    platform: "Platform | None" = None,
    interpreted: bool | None = None,
) -> Backend:
    """The backend of this process. CUDA has one; on the CPU there is a choice.

    Args:
        cpu_backend: None for the environment variable ``QAMW_CPU_BACKEND``, or ``decode``.
        platform: None for vLLM's current platform.
        interpreted: whether Triton's interpreter runs the kernels; None to find out.

    Raises:
        BackendError: another platform, an unknown value, ``triton`` on the CPU without the
            interpreter, or results on CUDA are to be the same in every batch.
    """
    platform = current_platform if platform is None else platform
    if platform.is_cuda():
        if envs.VLLM_BATCH_INVARIANT:
            raise BackendError(
                "VLLM_BATCH_INVARIANT=1: the kernels of qamw depend on the number of tokens, so "
                "results differ in their last bits"
            )
        return "triton"
    if not platform.is_cpu():
        raise BackendError(f"qamw runs on CUDA and on the CPU, not on {platform.device_name}")
    if cpu_backend is None:
        cpu_backend = os.environ.get(CPU_BACKEND_VARIABLE, "decode")
    if cpu_backend == "decode":
        return "decode"
    if cpu_backend != "triton":
        raise BackendError(
            f"{CPU_BACKEND_VARIABLE} must be 'decode' or 'triton', got {cpu_backend!r}"
        )
    if not (kernels_are_interpreted() if interpreted is None else interpreted):
        raise BackendError(
            f"{CPU_BACKEND_VARIABLE}=triton runs the kernels in Triton's interpreter: "
            "set TRITON_INTERPRET=1 too"
        )
    return "triton"


def check_adapters(prefix: str) -> None:
    """Refuse packed experts where vLLM would replace their kernel to add LoRA adapters.

    Raises:
        BackendError: LoRA is on without a list of target modules, which would include experts.
    """
    config = get_current_vllm_config_or_none()
    lora = config and config.lora_config
    if lora and lora.target_modules is None:
        raise BackendError(
            f"{prefix}: vLLM's LoRA does not support packed experts, but without a list of modules "
            "it is applied to all: name the modules that the adapters have, such as "
            "--lora-target-modules q_proj k_proj v_proj o_proj"
        )


def describe_backend(backend: Backend, dtype: torch.dtype) -> str:
    """What runs, and why, in one sentence."""
    if backend == "decode":
        return (
            f"Decoded to {dtype} while loading, for vLLM's own matrix multiplication, "
            "because this is a CPU: that saves no memory"
        )
    if current_platform.is_cpu():
        return "They stay packed; Triton kernels run in the interpreter (slow)"
    from qamw_kernels.ops.gluon import table

    if not table.HAS_GATHER:
        reason = "this Triton has no shared-memory gather (Triton 3.7.1 has it)"
    elif dtype not in table.DTYPES:
        reason = f"the kernels in Gluon do not support {dtype}"
    else:
        return (
            "They stay packed, for kernels in Gluon; plain Triton kernels do the rest "
            "(such as experts before compute capability 9.0)"
        )
    return f"They stay packed; plain Triton kernels decode them, because {reason}"


def warm_up_once(
    format: QamwFormat,
    dtype: torch.dtype,
    device: torch.device,
    experts: bool = False,
) -> None:
    """Compile the kernels of a whole model, once per process, and once more for its experts.

    This happens before CUDA graphs are captured, so that serving does not compile them. On the CPU
    nothing is compiled.
    """
    if not current_platform.is_cuda():
        return
    used = {format.index_bits, *format.layer_index_bits.values()}
    rates = frozenset(Rate(index_bits, format.code) for index_bits in used)
    _warm_up(rates, frozenset(format.rotation_block_sizes.values()), dtype, device, experts)


@functools.cache
def _warm_up(
    rates: frozenset[Rate],
    rotation_block_sizes: frozenset[int],
    dtype: torch.dtype,
    device: torch.device,
    experts: bool,
) -> None:
    from qamw_kernels.ops.warm_up import warm_up

    start = time.perf_counter()
    warm_up(rates, rotation_block_sizes, dtype, device, experts)
    seconds = time.perf_counter() - start
    used = sorted(rate.index_bits for rate in rates)
    logger.info("QAM-W: kernels for index bits %s were ready after %.1f s", used, seconds)
