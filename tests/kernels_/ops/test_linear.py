"""The torch ops on the CPU: schema and fakes (opcheck), error messages, and imports."""

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from qamw_kernels.ops import linear as ops
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.weight import TiledWeight
from tests.helpers.weights import random_weight

pytestmark = pytest.mark.skipif(interpreted(), reason="CPU tensors run the Triton kernels")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N, K, B = 20, 192, 64


def tiled_weight(index_bits: int) -> TiledWeight:
    return TiledWeight.of(random_weight(N, K, index_bits, B))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    *arguments, block = tiled_weight(11)
    for x in (torch.randn(3, K), torch.randn(2 * K, 3).T[:, ::2]):
        for bias in (None, torch.randn(N)):
            op = torch.ops.qamw.linear.default
            torch.library.opcheck(op, (x.to(dtype), *arguments, bias, block))


def test_opcheck_sees_a_wrong_fake() -> None:
    """The check of the check: an op whose fake has the wrong dtype fails."""
    library = torch.library.Library("qamw_test", "FRAGMENT")
    library.define("wrong(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("wrong", lambda x: x.clone(), "CPU")
    torch.library.register_fake(
        "qamw_test::wrong", lambda x: x.new_empty(x.shape, dtype=torch.int8), lib=library
    )
    with pytest.raises(Exception, match="mismatched tensor metadata"):
        torch.library.opcheck(torch.ops.qamw_test.wrong.default, (torch.randn(3),))


def to_device(weight: TiledWeight, device: str) -> TiledWeight:
    return TiledWeight(*(t.to(device) for t in weight[:-1]), weight.rotation_block_size)


def test_fakes_on_the_meta_device() -> None:
    x = torch.empty(2, 5, K, dtype=torch.float16, device="meta")
    y = ops.linear(x, to_device(tiled_weight(8), "meta"))
    assert y.shape == (2, 5, N) and y.dtype == torch.float16 and y.device.type == "meta"


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x": torch.randn(3, K + 64)},
            rf"input_scales: expected shape \({K + 64},\), got \({K},\)",
        ),
        (
            {"x": torch.randn(3, 32)},
            r"x: expected shape \[M, K\] with K a positive multiple of 64, got \(3, 32\)",
        ),
        (
            {"x": torch.randn(3, K).double()},
            r"x: expected dtype torch.bfloat16 or .*, got torch.float64",
        ),
        (
            {"input_scales": torch.ones(K)},
            "input_scales: expected dtype torch.float16, got torch.float32",
        ),
        (
            {"rotation_block_size": 48},
            r"rotation_block_size: expected one of \(16, .* 192 inputs, got 48",
        ),
        (
            {"rotation_block_size": 128},
            r"rotation_block_size: expected one of \(16, .* 192 inputs, got 128",
        ),
        (
            {"tiles": zeros(2, 1, 5, 32, 4)},
            r"tiles: expected shape \(2, 1, 6\.\.12, 32, 4\) for 20 rows and 192 "
            r".*got \(2, 1, 5, ",
        ),
        ({"tiles": zeros(8, N, 3)}, r"tiles: expected shape .*, got \(8, 20, 3\)"),
        (
            {"tiles": zeros(2, 1, 8, 32, 4, dtype=torch.float32)},
            "tiles: expected dtype torch.int32, got torch.float32",
        ),
        (
            {"tiles": zeros(2, 2, 8, 32, 4)},
            r"tiles: expected shape .*, got \(2, 2, 8, 32, 4\)",
        ),
        (
            {"tiles": zeros(2, 1, 9, 32, 4)},
            r"entry_words: expected shape \(128,\) or \(256,\), got \(64,\)",
        ),
        (
            {"row_norms": torch.ones(3 * N)},
            r"tiles: expected shape \(4, 1, .* for 60 rows and 192 inputs, "
            r"got \(2, 1, 8, 32, 4\)",
        ),
        (
            {"row_norms": torch.ones(N).half()},
            "row_norms: expected dtype torch.float32, got torch.float16",
        ),
        ({"bias": torch.ones(N - 1)}, r"bias: expected shape \(20,\), got \(19,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument_the_expectation_and_the_value(
    change: dict[str, Any], message: str, device: str
) -> None:
    arguments = {"x": torch.randn(3, K), "bias": None, **tiled_weight(8)._asdict(), **change}
    arguments = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    x, bias = arguments.pop("x"), arguments.pop("bias")
    with pytest.raises(ValueError, match=message):
        ops.linear(x, TiledWeight(**arguments), bias)


def test_one_device() -> None:
    weight = tiled_weight(8)
    weight = weight._replace(row_norms=weight.row_norms.to("meta"))
    with pytest.raises(ValueError, match="row_norms: expected device cpu, got meta"):
        ops.linear(torch.randn(3, K), weight)


def test_importing_again_keeps_the_ops() -> None:
    weight, x = tiled_weight(8), torch.randn(3, K)
    y = ops.linear(x, weight)
    importlib.reload(ops)
    assert torch.equal(y, ops.linear(x, weight))
    name = ops.__name__
    sys.modules.pop(name)
    try:
        again = importlib.import_module(name)
        assert again is not ops
        assert torch.equal(y, again.linear(x, weight))
    finally:
        sys.modules[name] = ops


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from qamw_kernels.ops.linear import linear
from qamw_kernels.ops.weight import TiledWeight, entry_words

tiles = torch.zeros(1, 1, 6, 32, 4, dtype=torch.int32)
scales = torch.ones(64, dtype=torch.float16)
weight = TiledWeight(tiles, torch.ones(3), scales, entry_words(6, "plain"), 64)
assert linear(torch.ones(2, 64), weight).shape == (2, 3)
assert not any("triton" in name for name in sys.modules if name.startswith("qamw_kernels"))
"""


def test_import_needs_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, False), ("", False), ("0", False), ("1", True), ("True", True), ("yes", True)],
)
def test_the_interpreter_is_asked_for_by_tritons_variable(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreted() is expected
