"""QAM-W checkpoints loaded by transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.helpers.models import tiny_model
from offline_quantize.model.checkpoint import INDEX
from offline_quantize.evaluation.run import load_model
from offline_quantize.pipeline import quantize
from qamw_kernels.integrations.transformers import QamwLinear
from qamw_kernels.codec.encode import decode_weight, encode_weight, make_input_scales


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3_text", "phi3"])
def checkpoint(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    quantize(tiny_model(folder / "model", request.param), folder / "quantized", calibration=None)
    return folder / "quantized"


@torch.no_grad()
def test_the_model_is_the_decoded_one(checkpoint: Path) -> None:
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    truth = load_model(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(model(ids).logits, truth(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), truth.generate(ids, max_new_tokens=5, do_sample=False))
    assert model.config.quantization_config.to_dict() == json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    without_head, truth = AutoModel.from_pretrained(checkpoint), load_model(checkpoint, torch.bfloat16)
    assert torch.equal(without_head(ids).last_hidden_state, truth.base_model(ids).last_hidden_state)


def test_a_missing_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    index = json.loads((damaged / INDEX).read_text())
    name = next(name for name in index["weight_map"] if name.endswith("down_proj.row_norms"))
    shard = damaged / index["weight_map"].pop(name)
    (damaged / INDEX).write_text(json.dumps(index))
    save_file({key: tensor for key, tensor in load_file(shard).items() if key != name}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"the checkpoint lacks {name}"):
        AutoModelForCausalLM.from_pretrained(damaged)


@torch.no_grad()
def test_packed_layer() -> None:
    """What a GPU runs, here with the op's CPU implementation."""
    quantized = encode_weight(torch.randn(100, 256), 9, 64, make_input_scales(256))
    layer = QamwLinear(torch.nn.Linear(256, 100), 9, 64)
    for name in ("qweight", "row_norms", "input_scales"):
        layer.register_buffer(name, getattr(quantized, name))
    x = torch.randn(2, 3, 256)
    plain = layer.plain(torch.float32)
    assert torch.equal(plain.weight, decode_weight(quantized))
    layer.pack()
    assert set(dict(layer.named_buffers())) == {"tiles", "row_norms", "input_scales", "quadrant_words"}
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


def test_experts_are_refused(tmp_path: Path) -> None:
    quantize(tiny_model(tmp_path / "model", "mixtral"), tmp_path / "out", calibration=None)
    with pytest.raises(ValueError, match=r"experts\.0\.w1\.qweight: transformers merges experts while loading.* qamw dequantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
