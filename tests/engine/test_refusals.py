"""Checkpoints that the engine refuses to load, and how it explains why."""

import re

import pytest
import torch

from tests.helpers.checkpoints import change_quantization_config, change_tensor, sign
from tests.helpers.engine import TWO_RANKS
from tests.helpers.models import copy_model

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("refusals")]


def drop(tensor: torch.Tensor) -> None:
    """A change for change_tensor that drops the tensor."""


def nan_in_row_5(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor(5), torch.nan)


def test_damaged_checkpoints_are_refused(run, checkpoint, tmp_path):
    """Some by their manifest, and those with a manifest that fits the damage by what arrives."""
    good, good_experts = checkpoint("llama"), checkpoint("mixtral")
    dropped = copy_model(good, tmp_path / "dropped")
    change_tensor(dropped, "model.layers.1.mlp.up_proj.row_norms", drop)
    poisoned = copy_model(good, tmp_path / "poisoned")
    change_tensor(poisoned, "model.layers.0.self_attn.o_proj.row_norms", nan_in_row_5)
    mixed = copy_model(good, tmp_path / "mixed")
    change_quantization_config(mixed, ignore=["lm_head", "model.layers.0.mlp.gate_proj"])
    other = copy_model(good, tmp_path / "other")
    change_quantization_config(other, codebooks={"circular-gaussian-2048-v1": "0" * 64})
    weight = "model.layers.1.block_sparse_moe.experts.2.w3"
    expert = copy_model(good_experts, tmp_path / "expert")
    change_tensor(expert, f"{weight}.input_scales", drop)
    router = copy_model(good_experts, tmp_path / "router")
    change_tensor(router, "model.layers.0.block_sparse_moe.gate.weight", drop)
    embedding = copy_model(good, tmp_path / "embedding")
    change_tensor(embedding, "model.embed_tokens.weight", drop)
    for signed in (dropped, poisoned, mixed, other, expert, router, embedding):
        sign(signed)
    plain = copy_model(good_experts.parent / "model", tmp_path / "plain")
    change_tensor(plain, f"{weight}.weight", drop)
    integers = copy_model(good_experts.parent / "model", tmp_path / "integers")
    change_tensor(integers, f"{weight}.weight", lambda tensor: tensor.to(torch.int16))
    norm = copy_model(good.parent / "model", tmp_path / "norm")
    change_tensor(norm, "model.norm.weight", drop)
    changed = copy_model(good, tmp_path / "changed")
    change_tensor(changed, "model.embed_tokens.weight", lambda tensor: tensor.roll(1))
    cases = {  # experts first: vLLM does not start with them behind an engine that failed
        expert: f"the checkpoint lacks {weight}.input_scales",
        plain: f"the checkpoint lacks {weight}.weight",
        integers: f"{weight}.weight is torch.int16, expected floating point",
        router: "not initialized from checkpoint: {'model.layers.0.block_sparse_moe.gate.weight'}",
        dropped: "the checkpoint lacks model.layers.1.mlp.up_proj.row_norms",
        poisoned: (
            "model.layers.0.self_attn.o_proj.row_norms: "
            "expected finite values, not negative, got nan in row 5"
        ),
        mixed: "model.layers.0.mlp.gate_up_proj: vLLM fuses these modules",
        other: "codebooks: this version of qamw ships",
        embedding: "not initialized from checkpoint: {'model.embed_tokens.weight'}",
        norm: "not initialized from checkpoint: {'model.norm.weight'}",
        changed: ".safetensors: SHA-256",
    }
    jobs = [{"model": str(model), "options": {"quantization": "qamw"}} for model in cases]
    results, _ = run(jobs)
    for result, message in zip(results, cases.values(), strict=True):
        assert message in result["error"]


def test_impossible_tensor_parallel_size_is_refused(run, checkpoint, tmp_path):
    damaged = copy_model(checkpoint("llama"), tmp_path / "model")
    change_quantization_config(damaged, rotation_block_sizes={"256": 256, "512": 256})
    sign(damaged)
    ((result,), printed) = run([{"model": str(damaged), "options": TWO_RANKS}])
    assert "error" in result
    assert re.search(
        r"o_proj: tensor_parallel_size=2 leaves 128 of the 256 inputs .* "
        r"Possible for this layer: 1\. Quantize with a larger --tp-max",
        printed,
    )
