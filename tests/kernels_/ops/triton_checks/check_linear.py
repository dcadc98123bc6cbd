"""The whole linear layer on the kernels: the op, its workspace, and the check of the benchmark."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

from benchmarks.kernels import check
from qamw_kernels.codec.decode import decode_weight, linear_reference
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.weight import TiledWeight
from tests.kernels_.ops.triton_checks.common import (
    DEVICE,
    DTYPES,
    NUM_ROWS,
    assert_as_good_as_torch,
    linear,
    random,
    random_weight,
)


@pytest.mark.parametrize("num_tokens", [15, 129])
@pytest.mark.parametrize(
    "dtype, rotation_block_size",
    [
        *itertools.product(DTYPES, [64]),
        (torch.bfloat16, 512),
        *(
            pytest.param(dtype, 512, marks=pytest.mark.matrix)
            for dtype in DTYPES
            if dtype != torch.bfloat16
        ),
    ],
)
def test_linear_end_to_end(dtype: torch.dtype, rotation_block_size: int, num_tokens: int) -> None:
    """15 tokens are multiplied with the packed weight; 129 with the decoded one."""
    weight = random_weight(NUM_ROWS, 1536, 11, rotation_block_size)
    x = random(3, num_tokens // 3, 2 * 1536, dtype=dtype)[..., ::2]  # not contiguous
    bias = random(NUM_ROWS, dtype=dtype, seed=2)
    # The kernels round three times (scaled, rotated, result), the reference once: sqrt(3) < 2.
    exact = x.double() @ decode_weight(weight).double().T
    of_torch, with_bias = linear_reference(x, weight), linear_reference(x, weight, bias)
    assert_as_good_as_torch(linear(x, weight), of_torch, exact)
    assert_as_good_as_torch(linear(x, weight, bias), with_bias, exact + bias.double())

    def some_rows_at_once(bias: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(num_tokens, 1536)
        tiled = TiledWeight.of(weight)
        y = launch.multiply_dequantized(flat, tiled, bias, weights_at_once=48 * 1536)
        return y.view(*x.shape[:-1], NUM_ROWS)

    if num_tokens == 129:
        assert_as_good_as_torch(some_rows_at_once(None), of_torch, exact)
        assert_as_good_as_torch(some_rows_at_once(bias), with_bias, exact + bias.double())


def test_one_workspace_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 rows at a time; the memory of the last ones is free before the next are decoded."""
    empty, made = torch.empty, []

    def recorded(*shape: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*shape, **kwargs)
        if out.shape[-1] == 128:  # decoded rows [n, K]
            assert all(earlier() is None for earlier in made)
            made.append(weakref.ref(out))
        return out

    x, tiled = random(129, 128), TiledWeight.of(random_weight(NUM_ROWS, 128, 8))
    monkeypatch.setattr(torch, "empty", recorded)
    launch.multiply_dequantized(x, tiled, None, weights_at_once=48 * 128)
    assert len(made) == 3


# The second is SmolLM2-135M's, as one rank has it.
@pytest.mark.parametrize("num_rows, num_inputs", [(24, 64), (100, 576)])
def test_every_number_of_tokens(num_rows: int, num_inputs: int) -> None:
    weight = random_weight(num_rows, num_inputs, 11)
    inputs = random(257, num_inputs, dtype=torch.bfloat16)
    exact = inputs.double() @ decode_weight(weight).double().T
    for num_tokens in range(1, 258, 1 if num_inputs == 64 else 37):
        error = linear(inputs[:num_tokens], weight).double() - exact[:num_tokens]
        limit = 2**-6 * exact[:num_tokens].norm(dim=1)
        assert (error.norm(dim=1) < limit).all(), f"{num_tokens} tokens"


def test_no_tokens() -> None:
    weight = random_weight(NUM_ROWS, 128, 8)
    x = torch.zeros(0, 128, dtype=torch.bfloat16, device=DEVICE)
    assert linear(x, weight).shape == (0, NUM_ROWS)


@pytest.mark.parametrize(
    "kernel, num_tokens", [("rotate_kernel", 1), ("gemm_kernel", 1), ("dequantize_kernel", 129)]
)
def test_the_op_reaches_the_triton_kernels(
    kernel: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks would pass against plain torch too: make sure that it is not what ran."""
    weight, x = random_weight(NUM_ROWS, 128, 8), random(num_tokens, 128)
    right, launch_of, missed = linear(x, weight), KernelInterface.__getitem__, []

    def leave_one_out(launched: Any, grid: Any) -> Callable[..., Any]:
        if launched.__name__ != kernel:
            return launch_of(launched, grid)
        return lambda *args, **kwargs: missed.append(kernel)

    monkeypatch.setattr(KernelInterface, "__getitem__", leave_one_out)
    assert not torch.equal(linear(x, weight), right) and missed == [kernel]


def test_opcheck() -> None:
    *arguments, block = TiledWeight.of(random_weight(NUM_ROWS, 128, 8))
    op = torch.ops.qamw.linear.default
    torch.library.opcheck(op, (random(3, 128), *arguments, None, block))


def test_the_benchmark_gives_no_speed_for_wrong_results() -> None:
    def wrong(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return launch.multiply_packed(x, weight, bias).roll(1, 1)

    check.check(96, 512, 8, (1, 130), DEVICE)
    message = r"packed, 1 tokens, 96 x 512, 8 index bits: relative error 1.*no speed is given"
    with pytest.raises(SystemExit, match=message):
        check.check(96, 512, 8, (1, 130), DEVICE, {**check.WAYS, "packed": wrong})
