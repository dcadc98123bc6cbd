"""What is launched, without a GPU: the warm-up compiles every kernel that a model will need."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from qamw_kernels.format.codebook import PLAIN, TRELLIS
from qamw_kernels.ops.gluon import table
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.launcher import Processor
from qamw_kernels.ops.routing import sort_slots
from qamw_kernels.ops.tiling import tiled_shape
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.warm_up import warm_up
from qamw_kernels.ops.weight import Rate, TiledWeight, entry_words

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter replaces the compiler")

INDEX_BITS, SIZES = (8, 11), (16, 64, 128)
NUM_EXPERTS, TOP_K = 8, 2


class Recorder:
    """A launcher that launches nothing, and records which compiled kernels Triton would look up.

    Attributes:
        seen: every kernel with what it is specialized on, and the options of its compiler.
    """

    def __init__(self, processor: Processor | None) -> None:
        self.seen: set[str] = set()
        self._processor = processor
        self._binders: dict[str, Callable[..., Any]] = {}

    def processor(self, device: torch.device) -> Processor | None:
        return self._processor

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        name = kernel.__name__
        if name not in self._binders:
            backend = make_backend(GPUTarget("cuda", 90, 32))
            signature = inspect.signature(kernel.fn)
            self._binders[name] = create_function_from_signature(signature, kernel.params, backend)
        _, specialization, options = self._binders[name](*arguments, **constants)
        self.seen.add(f"{name}: {specialization}, {options}")


@pytest.fixture(params=[90, 100, None], ids=["sm_90", "sm_100", "plain"])
def recorder(request: pytest.FixtureRequest) -> Recorder:
    if request.param is None:
        return Recorder(None)
    if not table.HAS_GATHER:
        pytest.skip("this Triton has no shared-memory gather")
    return Recorder(Processor(132, 227 << 10, compute_capability=request.param))


def packed_kernels(recorder: Recorder, dtype: torch.dtype) -> set[str]:
    """Names of the kernels that multiply with packed weights."""
    processor = recorder.processor(torch.device("cpu"))
    if processor is None or dtype not in table.DTYPES:
        return {"gemm_kernel"}
    if processor.compute_capability == 90:
        return {"narrow_gemm_kernel", "wide_gemm_kernel", "add_sums_kernel", "rotate_many_kernel"}
    return {"narrow_gemm_kernel", "decode_gemm_kernel"}


def routed_kernels(recorder: Recorder, dtype: torch.dtype) -> set[str]:
    """Names of the kernels for mixtures of experts."""
    processor = recorder.processor(torch.device("cpu"))
    if processor is None or dtype not in table.DTYPES:
        return {"routed_gemm_kernel"}
    if processor.compute_capability == 90:
        return {"routed_narrow_gemm_kernel", "routed_wide_gemm_kernel"}
    return {"routed_narrow_gemm_kernel", "routed_gemm_kernel"}


def zero_weight(
    rate: Rate, size: int, num_rows: int, num_inputs: int, experts: tuple[int, ...] = ()
) -> TiledWeight:
    shape = (*experts, *tiled_shape(num_rows, num_inputs, rate.index_bits))
    return TiledWeight(
        torch.zeros(shape, dtype=torch.int32),
        torch.ones((*experts, num_rows)),
        torch.ones(num_inputs).half(),
        entry_words(*rate),
        size,
    )


def linear(
    recorder: Recorder,
    weight: TiledWeight,
    dtype: torch.dtype,
    num_tokens: int,
    bias_dtype: torch.dtype | None = None,
) -> None:
    x = torch.zeros(num_tokens, weight.num_inputs, dtype=dtype)
    bias = None
    if bias_dtype:
        bias = torch.zeros(weight.num_rows + 1, dtype=bias_dtype)[1:]  # not aligned
    launch.linear(x, weight, bias, recorder)


def routed_linear(
    recorder: Recorder, weight: TiledWeight, dtype: torch.dtype, num_tokens: int
) -> None:
    num_slots = TOP_K * num_tokens
    block_size = launch.routed_block_size(num_slots, NUM_EXPERTS, dtype, [weight], recorder)
    chosen = torch.zeros(num_tokens, TOP_K, dtype=torch.int32)
    routing = sort_slots(chosen, block_size, NUM_EXPERTS)
    x = torch.zeros(num_tokens, weight.num_inputs, dtype=dtype)
    y = launch.routed_linear(x, weight, routing, num_slots, recorder)
    launch.combine(y, torch.zeros(num_tokens, TOP_K), recorder)


@pytest.mark.parametrize(
    "dtype, code",
    [
        (torch.bfloat16, PLAIN),
        (torch.float16, PLAIN),
        (torch.float32, PLAIN),
        (torch.bfloat16, TRELLIS),
    ],
    ids=str,
)
def test_warm_up_compiles_everything(
    recorder: Recorder,
    dtype: torch.dtype,
    code: str,
    while_vllm_loads: Callable[[], AbstractContextManager[None]],
) -> None:
    with while_vllm_loads():
        device = torch.device("cpu")
        rates = [Rate(index_bits, code) for index_bits in INDEX_BITS]
        warm_up(rates, SIZES, dtype, device, experts=True, launcher=recorder)
    ready = set(recorder.seen)
    names = {line.split(":")[0] for line in ready}
    others = {"rotate_kernel", "dequantize_kernel", "combine_kernel"}
    others |= routed_kernels(recorder, dtype)
    assert names == others | packed_kernels(recorder, dtype)
    shapes = (
        (1, 128, 128),
        (30, 1088, 64),
        (64, 1024, 16),
        (48, 2048, 128),
        (150, 1024, 128),
        (1, 36864, 128),
    )
    for rate in (Rate(bits, code) for bits in INDEX_BITS):
        for num_rows, num_inputs, size in shapes:
            weight = zero_weight(rate, size, num_rows, num_inputs)
            experts = zero_weight(rate, size, num_rows, num_inputs, (NUM_EXPERTS,))
            for num_tokens in (*range(1, 66), 127, 128, 129, 256, 512, 1024, 1025):
                bias_dtype = (None, dtype, torch.float32)[num_tokens % 3]
                linear(recorder, weight, dtype, num_tokens, bias_dtype)
                routed_linear(recorder, experts, dtype, num_tokens)
    assert recorder.seen - ready == set()
    linear(recorder, zero_weight(Rate(7, code), 64, 64, 128), dtype, 1)
    # A rate that was not asked for would be compiled: the recorder sees it.
    assert len(recorder.seen - ready) == 1


@pytest.mark.parametrize(
    "num_tokens, num_inputs, on_sm_90, elsewhere",
    [
        (8, 128, "narrow_gemm_kernel", "narrow_gemm_kernel"),
        (8, 32832, "wide_gemm_kernel", "decode_gemm_kernel"),
        (9, 128, "wide_gemm_kernel", "decode_gemm_kernel"),
        (16, 128, "wide_gemm_kernel", "decode_gemm_kernel"),
        (17, 128, "wide_gemm_kernel", "dequantize_kernel"),
        (1024, 128, "wide_gemm_kernel", "dequantize_kernel"),
        (1025, 128, "dequantize_kernel", "dequantize_kernel"),
    ],
)
def test_which_kernel_multiplies(
    num_tokens: int, num_inputs: int, on_sm_90: str, elsewhere: str
) -> None:
    """On GPUs that were not measured; float32 has tensor cores nowhere, and the plain kernel."""
    if not table.HAS_GATHER:
        pytest.skip("this Triton has no shared-memory gather")
    for capability, expected in ((90, on_sm_90), (100, elsewhere)):
        recorder = Recorder(Processor(132, 227 << 10, capability))
        linear(recorder, zero_weight(Rate(11), 64, 64, num_inputs), torch.bfloat16, num_tokens)
        others = {"rotate_kernel", "rotate_many_kernel", "add_sums_kernel"}
        assert {line.split(":")[0] for line in recorder.seen} - others == {expected}
    recorder = Recorder(Processor(132, 227 << 10, 90))
    linear(recorder, zero_weight(Rate(11), 64, 64, num_inputs), torch.float32, num_tokens)
    plain = "gemm_kernel" if num_tokens <= 16 else "dequantize_kernel"
    assert {line.split(":")[0] for line in recorder.seen} - {"rotate_kernel"} == {plain}
