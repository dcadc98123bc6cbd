"""Experts of vLLM with packed weights: routing of tokens, and what is between the matrices."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.ops.routing import sort_slots
from qamw_vllm import experts as experts_module
from qamw_vllm.loader import without_experts
from tests.vllm_.layers import make_config, needs_cpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's kernel needs CUDA")
@pytest.mark.parametrize("parallel", [False, True])
def test_slots_are_sorted_as_vllm_sorts_them(parallel: bool) -> None:
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    expert_map = None
    if parallel:
        expert_map = torch.tensor([-1, 0, -1, 1, -1, 2], dtype=torch.int32, device="cuda")
    for num_tokens in (1, 5, 300):
        chosen = torch.randint(0, 6, (num_tokens, 2), dtype=torch.int32, device="cuda")
        ours = sort_slots(chosen, 16, 6, expert_map)
        theirs = moe_align_block_size(chosen, 16, 6, expert_map, ignore_invalid_experts=True)
        used = int(ours.num_sorted)
        assert int(theirs[2]) == used
        experts = ours.experts[: used // 16]
        assert torch.equal(experts, theirs[1][: used // 16])
        # The order inside an expert is free.
        blocks = [slots[:used].view(-1, 16).sort(1).values for slots in (ours.slots, theirs[0])]
        for expert in set(experts.tolist()) - {-1}:
            own = experts == expert
            assert torch.equal(*(block[own].flatten().sort().values for block in blocks))


HIDDEN, INNER, EXPERTS, TOKENS = 64, 128, 4, 6
PREFIX = "model.layers.0.mlp.experts"


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """That of gpt-oss."""
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def apply_interleaved(_: object, out: torch.Tensor, both: torch.Tensor, **__: object) -> None:
    """As vLLM's kernel, which CPU builds lack."""
    out.copy_(clamped_swiglu(both[:, ::2], both[:, 1::2]))


@needs_cpu
@pytest.mark.usefixtures("one_rank")
def test_biases_and_gates_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts as in gpt-oss, from tensors that only this loader gives them."""
    monkeypatch.setattr(experts_module.vllm_activation, "apply_moe_activation", apply_interleaved)
    config = make_config("triton", rotation_block_sizes={HIDDEN: 64, INNER: 64})
    runner: Any = FusedMoEFactory(
        EXPERTS, 2, HIDDEN, INNER,
        params_dtype=torch.float32, quant_config=config, prefix=PREFIX, has_bias=True,
        activation="swigluoai",
    )  # fmt: skip
    layer = runner.routed_experts
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    decoded: dict[str, list[torch.Tensor]] = {}
    shapes = {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    for name, shape in shapes.items():
        for expert in range(EXPERTS):
            weight = torch.randn(shape, generator=generator) / 4
            quantized = encode_weight(weight, 11, 64, make_input_scales(shape[1]))
            decoded.setdefault(name, []).append(decode_weight(quantized))
            module = f"{PREFIX}.{expert}.{name}"
            tensors |= {f"{module}.{x}": tensor for x, tensor in quantized.tensors().items()}
    model = torch.nn.ModuleDict({"experts": layer})
    other = "model.norm.weight", torch.ones(HIDDEN)
    assert list(without_experts([*tensors.items(), other], model)) == [other]

    biases = {
        x: torch.randn(getattr(layer, x).shape, generator=generator)
        for x in ("w13_bias", "w2_bias")
    }
    for name, bias in biases.items():
        getattr(layer, name).data.copy_(bias)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2, generator=generator)

    expected = torch.zeros(TOKENS, HIDDEN)
    for token, slot in torch.cartesian_prod(torch.arange(TOKENS), torch.arange(2)).tolist():
        expert = int(ids[token, slot])
        gate, up = (
            decoded[name][expert] @ x[token] + biases["w13_bias"][expert, first::2]
            for first, name in enumerate(("gate_proj", "up_proj"))
        )
        y = decoded["down_proj"][expert] @ clamped_swiglu(gate, up) + biases["w2_bias"][expert]
        expected[token] += weights[token, slot] * y
    found = layer.quant_method.apply(layer, x, weights, ids.int())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
