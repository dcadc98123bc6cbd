"""Experts of vLLM with packed weights: routing of tokens, and what is between the matrices."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import LoRAConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.errors import TensorError
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.routing import sort_slots
from qamw_kernels.ops.weight import TiledWeight
from qamw_vllm import experts as experts_module
from qamw_vllm.backend import BackendError
from qamw_vllm.config import QamwConfig
from qamw_vllm.loader import without_experts
from tests.helpers.vllm_rank import tensor_parallel_rank
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
    """The activation of gpt-oss."""
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def apply_interleaved(_: object, out: torch.Tensor, both: torch.Tensor, **__: object) -> None:
    """Computes the same as vLLM's kernel, which CPU builds lack."""
    out.copy_(clamped_swiglu(both[:, ::2], both[:, 1::2]))


MATRICES = {
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
Weights = dict[str, list[torch.Tensor]]
"""Name of a matrix -> that matrix of every expert."""


def biased_experts(config: QamwConfig) -> Any:
    """vLLM's experts as in gpt-oss."""
    runner: Any = FusedMoEFactory(
        EXPERTS, 2, HIDDEN, INNER,
        params_dtype=torch.float32, quant_config=config, prefix=PREFIX, has_bias=True,
        activation="swigluoai",
    )  # fmt: skip
    return runner.routed_experts


def random_weights(generator: torch.Generator) -> Weights:
    return {
        name: [torch.randn(shape, generator=generator) / 4 for _ in range(EXPERTS)]
        for name, shape in MATRICES.items()
    }


def encode(weight: torch.Tensor) -> QuantizedWeight:
    return encode_weight(weight, 11, 64, make_input_scales(weight.shape[1]))


def decoded(weights: Weights) -> Weights:
    return {
        name: [decode_weight(encode(weight)) for weight in experts]
        for name, experts in weights.items()
    }


def set_biases(layer: Any, generator: torch.Generator) -> None:
    for name in ("w13_bias", "w2_bias"):
        bias = getattr(layer, name).data
        bias.copy_(torch.randn(bias.shape, generator=generator))


def assert_computes(layer: Any, weights: Weights, generator: torch.Generator) -> None:
    """Every token has the weighted sum of its experts' products, biases and gates."""
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    shares = torch.rand(TOKENS, 2, generator=generator)
    expected = torch.zeros(TOKENS, HIDDEN)
    for token, slot in torch.cartesian_prod(torch.arange(TOKENS), torch.arange(2)).tolist():
        expert = int(ids[token, slot])
        gate, up = (
            weights[name][expert] @ x[token] + layer.w13_bias[expert, first::2]
            for first, name in enumerate(("gate_proj", "up_proj"))
        )
        y = weights["down_proj"][expert] @ clamped_swiglu(gate, up) + layer.w2_bias[expert]
        expected[token] += shares[token, slot] * y
    found = layer.quant_method.apply(layer, x, shares, ids.int())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_cpu
@pytest.mark.usefixtures("one_rank")
def test_biases_and_gates_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """From tensors that only this loader gives them."""
    monkeypatch.setattr(experts_module.vllm_activation, "apply_moe_activation", apply_interleaved)
    layer = biased_experts(make_config("triton", rotation_block_sizes={HIDDEN: 64, INNER: 64}))
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(generator)
    tensors = {
        f"{PREFIX}.{expert}.{name}.{suffix}": tensor
        for name, experts in weights.items()
        for expert, weight in enumerate(experts)
        for suffix, tensor in encode(weight).tensors().items()
    }
    model = torch.nn.ModuleDict({"experts": layer})
    other = "model.norm.weight", torch.ones(HIDDEN)
    assert list(without_experts([*tensors.items(), other], model)) == [other]
    set_biases(layer, generator)
    layer.quant_method.process_weights_after_loading(layer)
    assert_computes(layer, decoded(weights), generator)
    with pytest.raises(TensorError, match="vLLM does not reload the biases of experts"):
        layer.quant_method._loader.check_loaded()


@needs_cpu
@pytest.mark.usefixtures("one_rank")
def test_biased_experts_are_quantized_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From weights that vLLM's model writes into the parameters itself."""
    monkeypatch.setattr(experts_module.vllm_activation, "apply_moe_activation", apply_interleaved)
    config = QamwConfig()
    config.backend = "triton"
    layer = biased_experts(config)
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(generator)
    gates = zip(weights["gate_proj"], weights["up_proj"], strict=True)
    set_biases(layer, generator)
    layer.w13_weight.copy_(torch.stack([torch.stack(both, 1).flatten(0, 1) for both in gates]))
    layer.w2_weight[:-1].copy_(torch.stack(weights["down_proj"][:-1]))
    message = r"the checkpoint lacks .*mlp\.experts: w2 of this rank's expert 3"
    with pytest.raises(TensorError, match=message):
        layer.quant_method.process_weights_after_loading(layer)
    layer.w2_weight[-1].copy_(weights["down_proj"][-1])
    layer.quant_method.process_weights_after_loading(layer)
    assert_computes(layer, decoded(weights), generator)


@needs_cpu
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_quantize_their_own_experts_while_loading(rank: int) -> None:
    """With expert parallelism: the others arrive later, or never."""
    engine = VllmConfig()
    engine.parallel_config = ParallelConfig(
        tensor_parallel_size=2, enable_expert_parallel=True, distributed_executor_backend="mp"
    )
    config = QamwConfig()
    config.backend = "triton"
    weights = random_weights(torch.Generator().manual_seed(0))
    with tensor_parallel_rank(rank, 2, engine):
        runner: Any = FusedMoEFactory(
            EXPERTS, 2, HIDDEN, INNER,
            params_dtype=torch.float32, quant_config=config, prefix=PREFIX,
        )  # fmt: skip
        layer = runner.routed_experts
        record_metadata_for_reloading(layer)
        loaders = {"w13": layer.w13_weight.weight_loader, "w2": layer.w2_weight.weight_loader}
        for expert in range(EXPERTS):
            for shard, name in layer.quant_method.names.items():
                stem = "w2" if shard == "w2" else "w13"
                label = f"experts.{expert}.{name}.weight"
                parameter = getattr(layer, f"{stem}_weight", None)
                loaders[stem](parameter, weights[name][expert], label, shard, expert)
    mine = slice(2 * rank, 2 * rank + 2)
    expected = [encode(weight) for weight in weights["down_proj"][mine]]
    assert torch.equal(layer.w2_tiles, TiledWeight.of_experts(expected).tiles)
    gates = zip(weights["gate_proj"][mine], weights["up_proj"][mine], strict=True)
    expected = [encode(torch.cat(both)) for both in gates]
    assert torch.equal(layer.w13_tiles, TiledWeight.of_experts(expected).tiles)


@needs_cpu
@pytest.mark.usefixtures("one_rank")
def test_adapters_cannot_be_put_on_packed_experts() -> None:
    engine = VllmConfig()
    engine.lora_config = LoRAConfig(max_lora_rank=8)
    config = make_config("triton", rotation_block_sizes={HIDDEN: 64, INNER: 64})
    with set_current_vllm_config(engine):
        with pytest.raises(BackendError, match=r"mlp\.experts: vLLM's LoRA .* --lora-target-mod"):
            biased_experts(config)
        engine.lora_config.target_modules = ["q_proj"]
        biased_experts(config)
