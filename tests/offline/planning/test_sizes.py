"""Estimates of memory and disk."""

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from offline_quantize.errors import QuantizeError
from offline_quantize.files import PROGRESS
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from offline_quantize.planning.sizes import (
    SPARE_DISK_BYTES,
    MemoryEstimate,
    check_disk,
    estimate_memory,
    explained_memory_errors,
    scratch_bytes,
    state_bytes,
)
from tests.architectures.build import build


def test_disk_is_checked_for_what_is_needed(tmp_path: Path, tiny_llama: Path) -> None:
    """Mixed rates between two halves take more than the lower one; scratch is for tokens read."""
    plan, out = make_plan(tiny_llama, QuantizeRequest(bpw=5.9)), tmp_path / "out"
    copies = sum((tiny_llama / f).stat().st_size for f in plan.checkpoint.other_files())
    free = int(plan.output_bytes + plan.bytes_left) + copies + SPARE_DISK_BYTES
    check_disk(plan, out, 0, free)
    higher = make_plan(tiny_llama, QuantizeRequest(bpw=6.0))
    for other, tokens in ((higher, 0), (plan, 512)):
        with pytest.raises(QuantizeError, match="GB needed"):
            check_disk(other, out, tokens, free)
    check_disk(plan, out, 512, free + scratch_bytes(plan, 512))


@pytest.mark.parametrize(("architecture", "states"), [("gemma3n_text", 4), ("deepseek_v4", 4)])
def test_tokens_with_several_states_take_more(
    architecture: str, states: int, tmp_path: Path
) -> None:
    model = build(tmp_path / "model", architecture)
    plan = make_plan(model)
    hidden_size = json.loads((model / "config.json").read_text())["hidden_size"]
    assert state_bytes(plan, 512) == 2 * 512 * states * hidden_size


def test_finished_shards_count_as_written(tmp_path: Path, tiny_llama: Path) -> None:
    plan = make_plan(tiny_llama, QuantizeRequest(calibration=None))
    copies = sum((tiny_llama / f).stat().st_size for f in plan.checkpoint.other_files())
    free = plan.output_bytes + copies + SPARE_DISK_BYTES - 1000
    with pytest.raises(QuantizeError, match="GB needed"):
        check_disk(plan, tmp_path, 0, free)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
    check_disk(plan, tmp_path, 0, free)


def test_memory_without_calibration_is_a_layer_and_a_shard(tiny_llama: Path) -> None:
    plan = make_plan(tiny_llama, QuantizeRequest(calibration=None))
    estimate = estimate_memory(plan)
    layer = sum(plan.checkpoint.tensors[n].num_bytes for n in plan.layers[0].tensors)
    shards = 2 * max(shard.num_bytes for shard in plan.shards)
    assert (estimate.layer, estimate.shards) == (layer, shards)
    assert estimate.total == estimate.libraries + layer + shards


def test_memory_with_calibration(tiny_llama: Path) -> None:
    """The tiny model has hidden states of 256, inner activations of 512 and 384 words."""
    plan = make_plan(tiny_llama)
    estimate = estimate_memory(plan, calibration_tokens=16384)
    embeddings_head_and_norm = 2 * (384 + 384 + 1) * 256
    assert estimate.outside_layers == embeddings_head_and_norm
    assert estimate.states == 3 * 2 * 16384 * 256
    assert estimate.activations == 4 * 2 * 4 * 512 * 512
    assert estimate.layer_float32 == 2 * estimate.layer
    assert estimate.hessians == 4 * (256**2 * 3 + 512**2)
    assert estimate.factoring == 5 * 8 * 512**2
    assert estimate.logits == 5 * 4 * 512 * 384
    encoding = estimate.layer_float32 + estimate.hessians + estimate.factoring
    assert estimate.total == sum(asdict(estimate).values()) - min(encoding, estimate.logits)


def test_processes_share_the_tokens_by_batches(tiny_llama: Path) -> None:
    plan = make_plan(tiny_llama)
    estimates = [estimate_memory(plan, 16384, processes) for processes in (1, 2, 3, 100)]
    assert [e.states // (3 * 2 * 256) for e in estimates] == [16384, 8192, 3 * 2048, 2048]
    assert estimates[0].total - estimates[1].total == estimates[1].states
    alike = {"states": 0}
    assert asdict(estimates[0]) | alike == asdict(estimates[1]) | alike


def test_encoding_and_logits_do_not_come_together() -> None:
    common = {"libraries": 1, "layer": 2, "shards": 4, "outside_layers": 8, "states": 16}
    estimate = MemoryEstimate(
        **common, activations=32, layer_float32=100, hessians=100, factoring=100, logits=301
    )
    assert estimate.total == 63 + 301


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: not enough memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_too_little_memory_is_explained(tmp_path: Path, tiny_llama: Path, error: Exception) -> None:
    plan = make_plan(tiny_llama)
    message = (
        r"not enough memory, the run needs about \d.\d GiB .*calibration_tokens, or calibration"
    )
    with pytest.raises(QuantizeError, match=message), explained_memory_errors(plan, 512, tmp_path):
        raise error
    (tmp_path / PROGRESS).touch()
    message = r"not enough memory, .*with more memory, resume=True continues the run"
    with pytest.raises(QuantizeError, match=message), explained_memory_errors(plan, 0, tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), explained_memory_errors(plan, 0, tmp_path):
        raise RuntimeError("a bug")
