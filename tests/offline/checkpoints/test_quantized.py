"""Opening a quantized checkpoint, and what it stands for."""

import json
from pathlib import Path

import pytest
import torch

from offline_quantize.checkpoints.quantized import (
    decoded_tensors,
    effective_bits_per_weight,
    open_quantized,
)
from offline_quantize.errors import QuantizeError
from offline_quantize.files import CONFIG
from offline_quantize.model.checkpoint import Checkpoint
from qamw_kernels.format.index import INDEX
from tests.helpers.checkpoints import change_quantization_config, change_tensor, decoded
from tests.helpers.models import copy_model

MODULE = "model.layers.0.mlp.up_proj"


def test_modules_and_their_sizes(calibrated: Path, tiny_llama: Path) -> None:
    quantized = open_quantized(calibrated)
    assert len(quantized.modules) == 14
    shape = quantized.modules[MODULE]
    assert (shape.num_rows, shape.num_inputs) == (512, 256)
    assert shape.index_bits == quantized.format.index_bits_of(MODULE)
    stored = quantized.checkpoint.tensors
    num_bytes = sum(info.num_bytes for name, info in stored.items() if MODULE in name)
    assert shape.num_bytes == num_bytes
    assert effective_bits_per_weight(calibrated) == quantized.effective_bits_per_weight
    assert effective_bits_per_weight(tiny_llama) is None


def test_multimodal_models_may_say_how_they_are_quantized_in_text_config(
    calibrated: Path, tmp_path: Path
) -> None:
    other = copy_model(calibrated, tmp_path / "other")
    config = json.loads((other / CONFIG).read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (other / CONFIG).write_text(json.dumps(config))
    assert effective_bits_per_weight(other) == effective_bits_per_weight(calibrated)


def test_only_wanted_tensors_are_decoded(calibrated: Path) -> None:
    wanted = {f"{MODULE}.weight", "model.norm.weight", "no.such.tensor"}
    tensors = dict(decoded_tensors(Checkpoint(calibrated), torch.float32, wanted))
    assert set(tensors) == wanted - {"no.such.tensor"}
    assert torch.equal(tensors[f"{MODULE}.weight"], decoded(calibrated, MODULE))


def test_another_method_is_refused(calibrated: Path, tmp_path: Path) -> None:
    other = copy_model(calibrated, tmp_path / "other")
    change_quantization_config(other, quant_method="gptq")
    with pytest.raises(QuantizeError, match=r"config\.json: .*quant_method must be 'qamw'"):
        open_quantized(other)
    assert effective_bits_per_weight(other) is None


def test_missing_tensors_are_refused(calibrated: Path, tmp_path: Path) -> None:
    incomplete = copy_model(calibrated, tmp_path / "incomplete")
    (incomplete / INDEX).unlink()
    for shard in sorted(incomplete.glob("*.safetensors"))[1:]:
        shard.unlink()
    (shard,) = incomplete.glob("*.safetensors")
    shard.rename(incomplete / "model.safetensors")
    change_tensor(incomplete, f"{MODULE}.row_norms", lambda norms: None)
    with pytest.raises(QuantizeError, match=f"{MODULE}.row_norms is missing"):
        open_quantized(incomplete)


def test_a_weight_of_another_rate_is_not_decoded(calibrated: Path, tmp_path: Path) -> None:
    wrong = copy_model(calibrated, tmp_path / "wrong")
    change_tensor(wrong, f"{MODULE}.qweight", lambda planes: planes[1:].contiguous())
    expected = rf"{MODULE}\.qweight is torch\.int32 \[\d+, 512, 4\], expected torch\.int32 \[\d+,"
    with pytest.raises(QuantizeError, match=expected):
        list(decoded_tensors(Checkpoint(wrong), torch.bfloat16))
