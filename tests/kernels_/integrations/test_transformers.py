"""QAM-W checkpoints loaded by transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from offline_quantize.evaluation.engines import load_model
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import CODES, PLAIN, TRELLIS
from qamw_kernels.integrations.transformers import QamwLinear
from tests.helpers.checkpoints import change_tensor
from tests.helpers.models import copy_model, tiny_model
from tests.helpers.weights import random_weight

GOLDEN = Path(__file__).parents[2] / "golden" / "quantized"
UNCALIBRATED = QuantizeRequest(calibration=None)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3_text", "phi3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(folder / "model", request.param)
    code = TRELLIS if request.param == "phi3" else PLAIN
    quantize(model, folder / "quantized", QuantizeRequest(calibration=None, code=code))
    return folder / "quantized"


@torch.no_grad()
def test_the_model_is_the_decoded_one(checkpoint: Path) -> None:
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    decoded = load_model(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(model(ids).logits, decoded(ids).logits)
    tokens, expected = (
        m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, decoded)
    )
    assert torch.equal(tokens, expected)
    config = json.loads((checkpoint / "config.json").read_text())
    assert model.config.quantization_config.to_dict() == config["quantization_config"]
    without_head = AutoModel.from_pretrained(checkpoint)
    decoded = load_model(checkpoint, torch.bfloat16)
    states = without_head(ids).last_hidden_state
    assert torch.equal(states, decoded.base_model(ids).last_hidden_state)


def test_a_missing_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    index = json.loads((damaged / INDEX).read_text())
    name = next(name for name in index["weight_map"] if name.endswith("down_proj.row_norms"))
    shard = damaged / index["weight_map"].pop(name)
    (damaged / INDEX).write_text(json.dumps(index))
    kept = {key: tensor for key, tensor in load_file(shard).items() if key != name}
    save_file(kept, shard, metadata={"format": "pt"})
    with pytest.raises(TensorError, match=f"the checkpoint lacks {name}"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_a_plain_parameter_that_is_missing_is_refused(tmp_path: Path) -> None:
    damaged = copy_model(GOLDEN, tmp_path / "damaged")
    change_tensor(damaged, "model.norm.weight", lambda tensor: None)
    with pytest.raises(TensorError, match=r"the checkpoint lacks model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(damaged)


MODULE = "model.layers.0.mlp.up_proj"


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of a tensor: its third value."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[2] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("row_norms", with_value(-1), r"row_norms: expected finite values, .* -1\.0 in row 2"),
        ("row_norms", with_value(1e38), "row_norms: float32 cannot hold what row 2 can decode"),
        ("row_norms", with_value(1e5), r"weight\[2, \d+\] decodes to .* too large for .*float16"),
        ("row_norms", torch.Tensor.double, r"row_norms is F64 .*, expected F32 \[\d+\]"),
        ("input_scales", with_value(0), r"input_scales\[2\] = 0\.0: expected a finite, normal"),
        ("input_scales", torch.Tensor.bfloat16, r"input_scales is BF16 .*, expected F16 \[128\]"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(
    tmp_path: Path,
    suffix: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    damaged = copy_model(GOLDEN, tmp_path / "damaged")
    change_tensor(damaged, f"{MODULE}.{suffix}", change)
    with pytest.raises(TensorError, match=rf"^{MODULE}\.{message}"):
        AutoModelForCausalLM.from_pretrained(damaged, dtype=torch.float16)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    damaged = copy_model(GOLDEN, tmp_path / "damaged")
    first, second = sorted(damaged.glob("*.safetensors"))
    name = "model.norm.weight"
    both = [load_file(first), load_file(second)]
    tensor = next(tensors[name] for tensors in both if name in tensors)
    for file, tensors in zip((first, second), both, strict=True):
        save_file({**tensors, name: tensor}, file, metadata={"format": "pt"})
    with pytest.raises(TensorError, match=f"{name} is also in another file"):
        AutoModelForCausalLM.from_pretrained(damaged)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt_bigcode", "mamba2"])
def test_models_whose_own_code_initializes_linears(architecture: str, tmp_path: Path) -> None:
    quantize(tiny_model(tmp_path / "model", architecture), tmp_path / "out", UNCALIBRATED)
    ids = torch.randint(5, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model(ids).logits, load_model(tmp_path / "out")(ids).logits)


@pytest.mark.parametrize("code", CODES)
@torch.no_grad()
def test_packed_layer(code: str) -> None:
    """What a GPU runs, here with the op's CPU implementation."""
    quantized = encode_weight(torch.randn(100, 256), 9, 64, make_input_scales(256), code=code)
    layer = QamwLinear(torch.nn.Linear(256, 100), 9, 64, code)
    for name, tensor in quantized.tensors().items():
        layer.register_buffer(name, tensor)
    x = torch.randn(2, 3, 256)
    plain = layer.plain("up", torch.float32)
    assert torch.equal(plain.weight, decode_weight(quantized))
    layer.pack("up")
    buffers = {"tiles", "row_norms", "input_scales", "entry_words"}
    assert set(dict(layer.named_buffers())) == buffers
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_value_that_cannot_be_is_not_packed() -> None:
    layer = QamwLinear(torch.nn.Linear(256, 100), 9, 64, PLAIN)
    for name, tensor in random_weight(100, 256, 9).tensors().items():
        layer.register_buffer(name, tensor)
    layer.row_norms[3] = -1
    with pytest.raises(TensorError, match=r"up\.row_norms: .* in row 3"):
        layer.pack("up")
