"""From a quantized checkpoint back to a plain one."""

import json
from pathlib import Path

import pytest
import torch

from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.checkpoints.quantized import decoded_tensors
from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.format.index import INDEX
from qamw_kernels.format.manifest import MANIFEST
from tests.helpers.checkpoints import SMALL_SHARDS, tensors_of


def small_files(directory: Path) -> set[str]:
    """Names of the files that hold no weights."""
    return {path.name for path in directory.iterdir() if path.suffix != ".safetensors"}


def test_dequantize(tmp_path: Path, tiny_llama: Path) -> None:
    """Quantized weights come back decoded and rounded, all others as they were."""
    from transformers import AutoModelForCausalLM

    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    quantize(tiny_llama, quantized, QuantizeRequest(calibration=None))
    total = dequantize(quantized, plain, torch.float16, max_shard_bytes=SMALL_SHARDS)
    assert total == sum(info.num_bytes for info in Checkpoint(plain).tensors.values())
    assert len(list(plain.glob("*.safetensors"))) > 2
    restored, original = tensors_of(plain), tensors_of(tiny_llama)
    assert set(restored) == set(original)
    for name, tensor in decoded_tensors(Checkpoint(quantized), torch.float16):
        assert torch.equal(restored[name], tensor) and restored[name].dtype == tensor.dtype
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(restored[embeddings], original[embeddings])
    assert small_files(plain) == small_files(tiny_llama) | {MANIFEST, INDEX}
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(plain)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), restored[name])
    with pytest.raises(QuantizeError, match="already exists"):
        dequantize(quantized, plain)
    with pytest.raises(QuantizeError, match="this is not a QAM-W checkpoint"):
        dequantize(tiny_llama, tmp_path / "other")
    with pytest.raises(QuantizeError, match="nor inside it"):
        dequantize(quantized, quantized / "plain")
    quantize(plain, tmp_path / "again", QuantizeRequest(calibration=None))
    assert "all are correct" in verify(tmp_path / "again")


def test_progress_is_in_bytes(tmp_path: Path, calibrated: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    total = dequantize(
        calibrated,
        tmp_path / "plain",
        progress=lambda stage, done, whole: calls.append((stage, done, whole)),
    )
    assert {(stage, whole) for stage, _, whole in calls} == {("dequantizing", total)}
    done = [done for _, done, _ in calls]
    assert done == sorted(set(done)) and done[-1] == total
