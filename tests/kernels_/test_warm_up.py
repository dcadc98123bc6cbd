"""What the launchers launch, without a GPU: the warm-up compiles every kernel that a model will need."""

import inspect
from collections.abc import Callable

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from qamw_kernels.ops.gluon import launch as gluon_launch
from qamw_kernels.ops.triton import launch as triton_launch
from qamw_kernels.ops.linear import INTERPRETED, quadrant_words
from qamw_kernels.ops.routing import sort_slots
from qamw_kernels.ops.tiling import tiled_shape

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")

RATES, SIZES = (8, 11), (16, 64, 128)


class Recorder:
    """Stands for a kernel, and notes what Triton would look for in its cache of compiled ones."""

    def __init__(self, kernel, seen: set[str]) -> None:
        self.name, self.seen = kernel.__name__, seen
        self.bind = create_function_from_signature(inspect.signature(kernel.fn), kernel.params, make_backend(GPUTarget("cuda", 90, 32)))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            _, specialization, options = self.bind(*args, **kwargs)
            self.seen.add(f"{self.name}: {specialization}, {options}")

        return launch


@pytest.fixture(params=["gluon", "triton"])
def seen(request, monkeypatch) -> set[str]:
    seen: set[str] = set()
    for name in ("rotate_kernel", "gemm_kernel", "dequantize_kernel", "routed_gemm_kernel"):
        monkeypatch.setattr(triton_launch, name, Recorder(getattr(triton_launch, name), seen))
    if request.param == "gluon":
        if gluon_launch.kernels is None:
            pytest.skip("this Triton has no shared-memory gather")
        monkeypatch.setattr(gluon_launch.kernels, "decode_gemm_kernel", Recorder(gluon_launch.kernels.decode_gemm_kernel, seen))
        monkeypatch.setattr(gluon_launch, "fits", lambda rotated, index_bits: rotated.dtype in gluon_launch.GLUON_DTYPES)
        monkeypatch.setattr(gluon_launch, "_device_properties", lambda index: {"multiprocessor_count": 132, "max_shared_mem": 227 << 10})
    return seen


def launch(index_bits: int, size: int, dtype: torch.dtype, num_tokens: int, num_rows: int, num_inputs: int, bias: bool) -> None:
    tiles = torch.zeros(tiled_shape(num_rows, num_inputs, index_bits), dtype=torch.int32)
    triton_launch.linear(torch.zeros(num_tokens, num_inputs, dtype=dtype), tiles, torch.ones(num_rows), torch.ones(num_inputs).half(),
                         quadrant_words(index_bits), torch.zeros(num_rows, dtype=dtype) if bias else None, size)


def launch_routed(index_bits: int, size: int, dtype: torch.dtype, num_tokens: int, num_rows: int, num_inputs: int) -> None:
    tiles = torch.zeros((8, *tiled_shape(num_rows, num_inputs, index_bits)), dtype=torch.int32)
    block_size = triton_launch.routed_block_size(2 * num_tokens, 8, dtype)
    slots, experts, num_sorted, _ = sort_slots(torch.zeros(num_tokens, 2, dtype=torch.int32), block_size, 8)
    x, norms, scales = torch.zeros(num_tokens, num_inputs, dtype=dtype), torch.ones(8, num_rows), torch.ones(num_inputs).half()
    words = quadrant_words(index_bits)
    triton_launch.routed_linear(x, tiles, norms, scales, words, slots, experts, num_sorted, block_size, 2 * num_tokens, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_warm_up_compiles_everything(seen: set[str], dtype: torch.dtype, while_vllm_loads) -> None:
    with while_vllm_loads():
        triton_launch.warm_up(RATES, SIZES, dtype, torch.device("cpu"), experts=True)
    ready = set(seen)
    for index_bits in RATES:
        for num_rows, num_inputs, size in ((1, 128, 128), (30, 1088, 64), (64, 1024, 16), (48, 2048, 128)):
            for num_tokens in (*range(1, 66), 127, 128, 129, 256, 1000, 1024):
                launch(index_bits, size, dtype, num_tokens, num_rows, num_inputs, bias=num_tokens % 2 == 0)
                launch_routed(index_bits, size, dtype, num_tokens, num_rows, num_inputs)
    assert seen - ready == set()
    launch(7, 64, dtype, 1, 64, 128, bias=False)
    assert len(seen - ready) == 1, "a rate that was not asked for would be compiled: the recorder sees it"
