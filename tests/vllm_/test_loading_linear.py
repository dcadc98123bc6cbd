"""Tensors of linear layers that are missing or damaged."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("vllm")

from qamw_kernels.errors import TensorError
from tests.vllm_.layers import load, make_checkpoint, make_config, make_layer, needs_cpu

pytestmark = needs_cpu

Rank = Callable[[int, int], None]


def test_missing_tensors_are_named(rank: Rank) -> None:
    layer = make_layer("qkv_proj", make_config(), bias=True)
    matrices = make_checkpoint("qkv_proj", bias=True)
    del matrices[1]["row_norms"], matrices[2]["bias"]
    message = r"lacks model.layers.0.k_proj.row_norms, model.layers.0.v_proj.bias$"
    with pytest.raises(TensorError, match=message):
        load(layer, "qkv_proj", matrices)


@pytest.mark.parametrize(
    ("tensor", "damage", "message"),
    [
        (
            "row_norms",
            lambda t: t.index_fill_(0, torch.tensor(3), float("nan")),
            r"q_proj / .*row_norms: .*got nan in row 3",
        ),
        ("row_norms", lambda t: t.neg_(), "row_norms: expected finite values, not negative"),
        (
            "row_norms",
            lambda t: t.double(),
            r"q_proj.row_norms: expected shape \(256,\) torch.float32 .* torch.float64",
        ),
        (
            "input_scales",
            lambda t: t.index_fill_(0, torch.tensor(7), 0),
            r"q_proj.input_scales\[7\] = 0.0",
        ),
        (
            "input_scales",
            lambda t: t.mul_(2),
            r"k_proj.input_scales differs from model.layers.0.q_proj.input_scales",
        ),
        (
            "input_scales",
            lambda t: t[:64],
            r"q_proj.input_scales: expected shape \(256,\) .* has \(64,\)",
        ),
        (
            "qweight",
            lambda t: t[:, :128],
            r"q_proj.qweight: expected shape \(11, 256, 4\) .* has \(11, 128, 4\)",
        ),
        (
            "qweight",
            lambda t: t[:8],
            r"vLLM fuses .* model.layers.0.q_proj: 8 index bits, .*k_proj: 11 index bits",
        ),
        (
            "qweight",
            lambda t: t[:5],
            r"q_proj.qweight: expected 6 to 12 planes .* has \(5, 256, 4\)",
        ),
    ],
)
def test_damaged_tensors_are_named(
    tensor: str,
    damage: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    rank: Rank,
) -> None:
    matrices = make_checkpoint("qkv_proj")
    matrices[0][tensor] = damage(matrices[0][tensor])
    layer = make_layer("qkv_proj", make_config())
    with pytest.raises(TensorError, match=message):
        load(layer, "qkv_proj", matrices)
