"""Tensors of experts: each rank takes its part, and what is missing or damaged is named."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.errors import TensorError
from qamw_vllm.loading.experts import ExpertsLoader
from qamw_vllm.loading.experts_form import ExpertsForm, ExpertsShape
from qamw_vllm.state import LoadSummary

BITS = 11
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
SHAPES = {"w1": (128, 64, BITS), "w3": (128, 64, BITS), "w2": (64, 128, BITS)}

Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def make_experts(
    tp_rank: int = 0,
    tp_size: int = 1,
    expert_map: tuple[int, ...] = (0, 1),
) -> tuple[Any, ExpertsLoader]:
    """What the loader sees of vLLM's RoutedExperts: two experts of 128 x 64, hidden size 64.

    They take the form of what arrives; 11 index bits are expected.
    """
    here, inner = sum(number >= 0 for number in expert_map), 128 // tp_size
    layer: Any = torch.nn.Module()
    parallel = SimpleNamespace(tp_size=tp_size)
    layer.moe_config = SimpleNamespace(moe_parallel_config=parallel, tp_rank=tp_rank)
    layer.global_num_experts, layer.local_num_experts = len(expert_map), here
    layer._map_global_expert_id_to_local_expert_id = lambda expert: expert_map[expert]
    layer.weight_loader = lambda param, loaded, name, shard, expert, success: success or None
    loader = ExpertsLoader(layer, "experts", NAMES, SHAPES)

    def make_plain() -> None:
        for stem, rows, inputs in (("w13", 2 * inner, 64), ("w2", 64, inner)):
            parameter = torch.nn.Parameter(torch.zeros(here, rows, inputs), requires_grad=False)
            layer.register_parameter(f"{stem}_weight", parameter)

    bits = {"w13": BITS, "w2": BITS}
    shape = ExpertsShape(here, hidden=64, inner=inner)
    loader.form = ExpertsForm(layer, shape, bits, loader.load, make_plain, LoadSummary())
    return layer, loader


def load_experts(
    layer: Any,
    loader: ExpertsLoader,
    change: Change = lambda name, tensor: tensor,
) -> dict[str, torch.Tensor]:
    """Deliver two random experts; ``change`` may replace a tensor, or leave it out with None."""
    generator = torch.Generator().manual_seed(0)
    delivered = {}
    for expert in range(2):
        for shard, (rows, inputs, index_bits) in SHAPES.items():
            weight = torch.randn(rows, inputs, generator=generator)
            quantized = encode_weight(weight, index_bits, 64, make_input_scales(inputs))
            for suffix, stored in quantized.tensors().items():
                name = f"experts.{expert}.{NAMES[shard]}.{suffix}"
                tensor = change(name, stored)
                if tensor is not None:
                    parameter = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
                    target = getattr(layer, parameter)
                    loader.load(target, tensor, parameter, shard, expert, return_success=True)
                    delivered[name] = tensor
    return delivered


def test_experts_are_cut_or_distributed() -> None:
    whole, loader = make_experts()
    delivered = load_experts(whole, loader)
    loader.check_loaded()
    assert torch.equal(whole.w13_qweight[1][:, 128:], delivered["experts.1.up_proj.qweight"])
    second, loader = make_experts(tp_rank=1, tp_size=2)
    load_experts(second, loader)
    loader.check_loaded()
    assert torch.equal(second.w13_qweight[1][:, :64], whole.w13_qweight[1][:, 64:128])
    assert torch.equal(second.w13_row_norms[:, 64:], whole.w13_row_norms[:, 192:])
    assert torch.equal(second.w2_qweight, whole.w2_qweight[..., 1:])
    assert torch.equal(second.w2_row_norms, whole.w2_row_norms)
    assert torch.equal(second.w2_input_scales, whole.w2_input_scales[..., 64:])
    last, loader = make_experts(expert_map=(-1, 0))
    load_experts(last, loader)
    loader.check_loaded()
    assert torch.equal(last.w13_qweight[0], whole.w13_qweight[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "experts.1.up_proj.row_norms",
            lambda t: None,
            "the checkpoint lacks experts.1.up_proj.row_norms$",
        ),
        (
            "experts.0.down_proj.qweight",
            lambda t: t[:, :-1],
            r"experts.0.down_proj.qweight: expected shape \(11, 64, 2\) .* \(11, 63, 2\)",
        ),
        (
            "experts.1.up_proj.row_norms",
            lambda t: t.index_fill(0, torch.tensor(7), -1),
            "experts.1.up_proj.row_norms: .* -1.0 in row 7",
        ),
        (
            "experts.1.gate_proj.input_scales",
            lambda t: 2 * t,
            "experts.1.gate_proj.input_scales differs from that of other experts",
        ),
        (
            "experts.0.down_proj.input_scales",
            lambda t: 0 * t,
            r"experts.0.down_proj.input_scales\[0\] = ",
        ),
    ],
)
def test_damaged_experts_are_refused(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    message: str,
) -> None:
    layer, loader = make_experts()
    with pytest.raises(TensorError, match=message):
        load_experts(layer, loader, lambda own, t: change(t) if own == name else t)
        loader.check_loaded()


def arrive(layer: Any, loader: ExpertsLoader, shard: str, expert: int, index_bits: int) -> None:
    """Deliver a matrix of an expert by the parameters that the layer has."""
    rows, inputs, _ = SHAPES[shard]
    quantized = encode_weight(torch.ones(rows, inputs), index_bits, 64, make_input_scales(inputs))
    for suffix, tensor in quantized.tensors().items():
        name = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
        loader.load(getattr(layer, name), tensor, name, shard, expert)


def test_experts_take_the_rates_that_arrive() -> None:
    layer, loader = make_experts()
    for expert in range(2):
        for shard, index_bits in (("w1", 8), ("w3", 8), ("w2", 9)):
            arrive(layer, loader, shard, expert, index_bits)
    loader.check_loaded()
    assert layer.w13_qweight.shape == (2, 8, 256, 1)
    assert layer.w2_qweight.shape == (2, 9, 64, 2)
    assert layer.w13_weight.numel() == 0
    layer, loader = make_experts()
    arrive(layer, loader, "w1", 0, 8)
    message = r"experts.0.up_proj.qweight has 9 .* gate_proj and up_proj .* loaded before have 8"
    with pytest.raises(TensorError, match=message):
        arrive(layer, loader, "w3", 0, 9)


def test_experts_that_arrive_plain_are_plain() -> None:
    layer, loader = make_experts()
    for expert in range(2):
        for shard in SHAPES:
            name = f"{'w2' if shard == 'w2' else 'w13'}_weight"
            loader.load(getattr(layer, name), torch.ones(1), name, shard, expert)
    loader.check_loaded()
    assert layer.w13_weight.shape == (2, 256, 64) and layer.w13_qweight.numel() == 0
    loader.form.drop_other()
    assert set(dict(layer.named_parameters())) == {"w13_weight", "w2_weight"}
    layer, loader = make_experts()
    loader.load(layer.w2_weight, torch.ones(1), "w2_weight", "w2", 0)
    with pytest.raises(TensorError, match=r"lacks experts.0.gate_proj.weight, "):
        loader.check_loaded()
    message = r"must be quantized alike, .* experts.1.gate_proj.qweight beside .* not quantized"
    with pytest.raises(TensorError, match=message):
        arrive(layer, loader, "w1", 1, BITS)
