"""How kernels reach a device. Needs triton.

Everything that launches a kernel takes a ``launcher``, :data:`ON_DEVICE` by default. A test that
wants to see what is launched, without a GPU, passes one of its own, whose ``processor`` describes
the GPU to choose kernels for and whose ``launch`` notes its arguments.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv is for kernels: on the host it is many times slower."""
    return -(-a // b)


@dataclass(frozen=True)
class Processor:
    """What the choice of a kernel and of its grid depends on.

    Attributes:
        multiprocessors: of the GPU.
        shared_memory: bytes that one program may have.
        compute_capability: CUDA's, such as 90.
    """

    multiprocessors: int
    shared_memory: int
    compute_capability: int


class Launcher(Protocol):
    """Launches kernels, and knows the processor that they run on."""

    def processor(self, device: torch.device) -> Processor | None:
        """The GPU's; None for a device that runs Triton's interpreter."""

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        **constants: Any,
    ) -> None:
        """Launch ``kernel`` on the device of its first argument, a tensor.

        Args:
            kernel: a Triton or Gluon jit function.
            constants: its compile-time arguments, and options of its compiler.
        """


class DeviceLauncher:
    """Launches kernels on the device of their first argument."""

    def processor(self, device: torch.device) -> Processor | None:
        return _processor(device.index) if device.type == "cuda" else None

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        **constants: Any,
    ) -> None:
        with _current(arguments[0]):
            kernel[grid](*arguments, **constants)


ON_DEVICE = DeviceLauncher()


def _current(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _processor(index: int) -> Processor:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Processor(
        properties["multiprocessor_count"], properties["max_shared_mem"], 10 * major + minor
    )
