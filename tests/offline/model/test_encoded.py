"""Models that other methods quantized: what they decode to, with transformers as the judge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.cli import main
from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.tied import any_differ
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from tests.architectures.build import build
from tests.helpers.checkpoints import change_tensor, tensors_of
from tests.helpers.encoded import (
    compressed_checkpoint,
    encode_checkpoint,
    fp8_checkpoint,
    from_fp8,
    from_mxfp4,
    is_linear,
    mxfp4_checkpoint,
    to_fp8,
    to_mxfp4,
)
from tests.helpers.models import copy_model, tiny_model

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
COMPRESSED = {
    "int4 in groups": ("pack-quantized", INT4 | {"symmetric": True}, {}),
    "int4 with zero points": ("pack-quantized", INT4 | {"symmetric": False}, {}),
    "int8 by row": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        {"input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}},
    ),
    "fp8 by row": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        {
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "dynamic": True,
            }
        },
    ),
}
NONE = QuantizeRequest(calibration=None, rates="uniform")


def loaded_by_transformers(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def read(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(directory)
    tensors = dict(checkpoint.load(checkpoint.tensors))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()
    }
    return tensors


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> Path:
    return copy_model(tiny_llama, tmp_path / "model")


def test_fp8_in_blocks(llama: Path) -> None:
    fp8_checkpoint(llama, (64, 32))
    expected = loaded_by_transformers(llama).state_dict()
    for name, tensor in read(llama).items():
        assert torch.equal(tensor, expected[name]), name


def test_tensors_are_compared_as_they_are_once_decoded(llama: Path) -> None:
    """Two that have the same bytes, but other scales, differ."""
    fp8_checkpoint(llama)
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    tensors = load_file(llama / "model.safetensors")
    change_tensor(llama, other, lambda _: tensors[one])
    assert any_differ(Checkpoint(llama), [(one, other)])
    change_tensor(llama, f"{other}_scale_inv", lambda _: tensors[f"{one}_scale_inv"])
    assert not any_differ(Checkpoint(llama), [(one, other)])


@pytest.mark.parametrize("shape", [(70, 100), (128, 64), (3, 5)])
def test_blocks_that_are_cut_off(shape: tuple[int, int], llama: Path) -> None:
    """As DeepSeek-V3's keys and values have them, with 576 rows in blocks of 128."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    encoded, scales = to_fp8(weight, 32, 64)
    name = "model.layers.0.mlp.up_proj.weight"

    def encode(found: str, _: torch.Tensor) -> dict[str, torch.Tensor] | None:
        return {name: encoded, f"{name}_scale_inv": scales} if found == name else None

    encode_checkpoint(llama, {"quant_method": "fp8", "weight_block_size": [32, 64]}, encode)
    assert torch.equal(read(llama)[name], from_fp8(encoded, scales, 32, 64))


@pytest.mark.parametrize("scales_by", ["tensor", "row"])
@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_fp8_with_a_scale_for_all_or_for_each_row(
    quantization: dict[str, Any], scales_by: str, llama: Path
) -> None:
    """Scales of activations and caches are left out."""
    plain = load_file(llama / "model.safetensors")
    expected = {}

    def encode(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not is_linear(name, tensor):
            return None
        rows = 1 if scales_by == "row" else len(tensor)
        weight, scales = to_fp8(tensor, rows, tensor.shape[1])
        expected[name] = (weight.float() * scales).bfloat16()
        if scales_by == "tensor":
            scales = scales.reshape(())
        module = name.removesuffix(".weight")
        others = {f"{module}.input_scale": torch.ones(())}
        if module.endswith("k_proj"):
            others[f"{module.removesuffix('k_proj')}attn.k_scale"] = torch.ones(())
        return {name: weight, f"{name}_scale": scales, **others}

    encode_checkpoint(llama, quantization, encode)
    tensors = read(llama)
    assert tensors.keys() == plain.keys()
    assert expected
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected.get(name, plain[name])), name


def test_fp8_experts_in_one_tensor(tmp_path: Path) -> None:
    directory = build(tmp_path / "model", "qwen3_vl_moe")
    expected = {}

    def encode(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        pairs = [to_fp8(expert, 64, 64) for expert in tensor]
        expected[name] = torch.stack([from_fp8(*pair, 64, 64) for pair in pairs])
        weights, scales = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return {name: weights, f"{name}_scale_inv": scales}

    encode_checkpoint(directory, {"quant_method": "fp8", "weight_block_size": [64, 64]}, encode)
    tensors = read(directory)
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_two_values_in_a_byte_beside_fp8(llama: Path) -> None:
    """As DeepSeek-V4 has its experts, with exponents as scales under a name of their own."""
    expected = {}

    def encode(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith("up_proj.weight"):
            return None
        packed, exponents = to_mxfp4(tensor)
        expected[name] = from_mxfp4(packed, exponents)
        scale = exponents.view(torch.float8_e8m0fnu)
        return {name: packed.view(torch.int8), f"{name.removesuffix('.weight')}.scale": scale}

    encode_checkpoint(llama, {"quant_method": "fp8", "weight_block_size": [128, 128]}, encode)
    tensors = read(llama)
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_mxfp4(tmp_path: Path) -> None:
    directory = build(tmp_path / "model", "gpt_oss")
    mxfp4_checkpoint(directory)
    expected = loaded_by_transformers(directory).state_dict()
    tensors = read(directory)
    assert [name for name in tensors if name.endswith("gate_up_proj")]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", COMPRESSED.values(), ids=COMPRESSED)
def test_compressed_tensors(case: tuple[str, dict[str, Any], dict[str, Any]], llama: Path) -> None:
    """The package's own way through transformers decodes to the same."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    plain = load_file(llama / "model.safetensors")
    form, weights, group = case
    compressed_checkpoint(llama, form, weights, **group)
    config = json.loads((llama / "config.json").read_text())["quantization_config"]
    config = CompressedTensorsConfig(**config, dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=config
    ).state_dict()
    tensors = read(llama)
    assert tensors.keys() == plain.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
        assert torch.equal(tensor, plain[name]) == (not is_linear(name, tensor)), name


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "int4"])
def test_the_result_is_that_of_the_decoded_model(form: str, tmp_path: Path) -> None:
    """Byte for byte, but for what reports say of the source."""
    if form == "mxfp4":
        source = build(tmp_path / "source", "gpt_oss")
        mxfp4_checkpoint(source)
    else:
        source = tiny_model(tmp_path / "source", "llama")
        if form == "fp8":
            fp8_checkpoint(source)
        else:
            compressed_checkpoint(source, "pack-quantized", INT4 | {"symmetric": True})
    decoded = copy_model(source, tmp_path / "decoded")
    save_file(read(source), decoded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (decoded / "config.json").write_text(json.dumps(config))

    request = QuantizeRequest(calibration_tokens=512)
    report = quantize(source, tmp_path / "ours", request)
    quantize(decoded, tmp_path / "expected", request)
    ours, expected = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name
    configs = [
        json.loads((tmp_path / out / "config.json").read_text()) for out in ("ours", "expected")
    ]
    assert configs[0] == configs[1]
    assert report.source_encoding.startswith({"int4": "compressed-tensors"}.get(form, form))
    stored = sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    assert report.source_bytes == stored
    for file in ("README.md", "qamw_report.json"):
        assert report.source_encoding in (tmp_path / "ours" / file).read_text()


@torch.no_grad()
def test_it_is_measured_as_it_is_decoded(llama: Path) -> None:
    """What ``qamw eval`` runs is what transformers runs."""
    fp8_checkpoint(llama)
    ids = torch.arange(20, 44).reshape(2, 12)
    expected = loaded_by_transformers(llama).float()(input_ids=ids).logits
    torch.testing.assert_close(load_model(llama)(input_ids=ids).logits, expected)


def test_plan_says_so(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fp8_checkpoint(llama)
    assert main(["plan", str(llama), "--calibration", "none"]) == 0
    shown = capsys.readouterr().out
    assert "already quantized (fp8 in blocks of 128 x 128), and is decoded first" in shown
    stored = sum(t.nbytes for t in load_file(llama / "model.safetensors").values())
    assert f"instead of {stored / 1e6:.1f} MB" in shown


def test_settings_inside_the_decoder_config_are_found_and_do_not_stay(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "gemma3")
    fp8_checkpoint(source)
    file = source / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    file.write_text(json.dumps(config))
    quantize(source, tmp_path / "out", NONE)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "qamw"
    assert "quantization_config" not in written["text_config"]


PROJECTION = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_scale_is_refused(llama: Path) -> None:
    fp8_checkpoint(llama)
    change_tensor(llama, f"{PROJECTION}_scale_inv", lambda _: None)
    with pytest.raises(QuantizeError, match=f"{llama}: {PROJECTION}: .*float8.* has no scale"):
        make_plan(llama)


def test_scales_of_other_blocks_are_refused(llama: Path) -> None:
    fp8_checkpoint(llama)
    change_tensor(llama, f"{PROJECTION}_scale_inv", lambda scales: torch.ones(7, 3))
    message = rf"{PROJECTION}: scales of shape \(7, 3\) .* in blocks of \[128, 128\]"
    with pytest.raises(QuantizeError, match=message):
        make_plan(llama)


@pytest.mark.parametrize("size", [[128], [0, 128], ["128", 128], 128, [True, 128], {}])
def test_blocks_of_other_sizes_than_positive_integers_are_refused(size: Any, llama: Path) -> None:
    fp8_checkpoint(llama)
    file = llama / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["weight_block_size"] = size
    file.write_text(json.dumps(config))
    with pytest.raises(QuantizeError, match="weight_block_size must be two positive integers"):
        make_plan(llama)


def test_a_weight_that_unpacks_to_another_shape_is_refused(llama: Path) -> None:
    compressed_checkpoint(llama, "pack-quantized", INT4 | {"symmetric": True})
    name = PROJECTION.removesuffix("weight") + "weight_shape"
    change_tensor(llama, name, lambda shape: shape - 8)
    with pytest.raises(QuantizeError, match=PROJECTION):
        quantize(llama, llama.parent / "out", NONE)


def test_a_scale_that_is_not_finite_is_refused(llama: Path) -> None:
    fp8_checkpoint(llama)
    change_tensor(llama, f"{PROJECTION}_scale_inv", lambda scales: scales * torch.nan)
    with pytest.raises(Exception, match=PROJECTION):
        quantize(llama, llama.parent / "out", NONE)


@pytest.mark.parametrize("card", [None, "base_model: ORG/NAME", "base_model:\n- ORG/NAME"])
def test_other_methods_are_refused(card: str | None, llama: Path) -> None:
    """With the model that the model card was made from, if it says so."""
    file = llama / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    named = "$"
    if card:
        (llama / "README.md").write_text(f"---\nlicense: mit\n{card}\n---\n# A model\n")
        named = ", ORG/NAME$"
    with pytest.raises(QuantizeError, match=f"gptq, .* start from the unquantized model{named}"):
        make_plan(llama)
