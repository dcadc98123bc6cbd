"""Matrices of experts in one tensor, and apart."""

import pytest
import torch

from qamw_kernels.format.stacks import Slice, Stack, block_of, name_apart

EXPERTS, ROWS, INPUTS = 3, 8, 5


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "rows", [(slice(0, 4), slice(4, None)), (slice(0, None, 2), slice(1, None, 2))]
)
def test_a_stack_is_split_and_joined(rows: tuple[slice, slice], transposed: bool) -> None:
    shape = (EXPERTS, INPUTS, ROWS) if transposed else (EXPERTS, ROWS, INPUTS)
    slices = {
        name_apart("mlp.experts.gate_up_proj", expert, f"{part}.weight"): Slice(
            expert, own, transposed
        )
        for part, own in zip(("gate_proj", "up_proj"), rows, strict=True)
        for expert in range(EXPERTS)
    }
    stack, values = Stack("mlp.experts.gate_up_proj", shape, slices), torch.randn(shape)
    apart = dict(stack.split(values))
    assert {tuple(part.shape) for part in apart.values()} == {(ROWS // 2, INPUTS)}
    assert {stack.shape_of(name) for name in apart} == {(ROWS // 2, INPUTS)}
    whole = values[1].T if transposed else values[1]
    assert torch.equal(apart["mlp.experts.1.up_proj.weight"], whole[rows[1]])
    assert torch.equal(stack.join(apart), values)


@pytest.mark.parametrize(
    ("stack", "block"),
    [
        ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts."),
        ("layers.0.moe.input_linear.weight", "layers.0.moe.experts."),
        ("layers.0.moe.gate_proj.weight", "layers.0.moe.experts."),
    ],
)
def test_names_are_those_of_checkpoints_with_experts_apart(stack: str, block: str) -> None:
    assert block_of(stack) == block
    assert name_apart(stack, 12, "up_proj.weight") == f"{block}12.up_proj.weight"
