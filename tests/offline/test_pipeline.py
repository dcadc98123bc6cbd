"""The offline quantizer on tiny models: what is written, and what is refused."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.calibration.text import DEFAULT_TEXT
from offline_quantize.checkpoints.inspect import inspect
from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.output.report import Report
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.errors import QamwError, TensorError
from qamw_kernels.format.codebook import PLAIN, TRELLIS
from tests.helpers.checkpoints import LITTLE_CALIBRATION, decoded, files_of, tensors_of
from tests.helpers.models import copy_model, tiny_model
from tests.offline.interruptions import file_size_limit

UNCALIBRATED = QuantizeRequest(calibration=None)
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
)
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    model, out = tiny_model(tmp_path / "model", architecture), tmp_path / "out"
    (model / "README.md").write_text("the model's own card")
    report = quantize(model, out, UNCALIBRATED)
    before, after = tensors_of(model), tensors_of(out)
    quantized = {layer.name for layer in report.layers}
    assert len(quantized) == 2 * (4 if architecture == "phi3" else 7)
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in quantized:
            error = (decoded(out, module) - tensor.float()).square().sum()
            assert float(error / tensor.float().square().sum()) < 0.0013
        else:
            assert torch.equal(after[name], tensor)
    assert verify(out)
    for file in COPIED:
        assert (out / file).read_bytes() == (model / file).read_bytes()
    assert (out / "README.base-model.md").read_text() == "the model's own card"
    config, source = (json.loads((d / "config.json").read_text()) for d in (out, model))
    assert config.pop("quantization_config")["quant_method"] == "qamw" and config == source


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_input_groups(architecture: str, tmp_path: Path) -> None:
    model = Checkpoint(tiny_model(tmp_path / "model", architecture))
    layer = find_structure(model).layers[0]
    groups = [[linear.name.rpartition(".")[2] for linear in group] for group in layer.groups]
    if architecture == "phi3":
        assert groups == [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]
    else:
        attention = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
        assert groups == [*attention, ["gate_proj", "up_proj"], ["down_proj"]]


def mean_log_error(report: Report) -> float:
    return sum(math.log(layer.output_nmse) for layer in report.layers) / len(report.layers)


def test_encoders_and_calibration(tiny_llama: Path, calibrated: Path, tmp_path: Path) -> None:
    """Each step lowers the error of the outputs on the same text; fused layers share scales."""
    request = QuantizeRequest(encoder="nearest", rates="uniform")
    nearest = quantize(tiny_llama, tmp_path / "nearest", request)
    uniform = quantize(tiny_llama, tmp_path / "uniform", QuantizeRequest(rates="uniform"))
    mixed = json.loads((calibrated / "qamw_report.json").read_text())
    encoders = (mixed["encoder"], nearest.encoder, uniform.encoder)
    assert encoders == ("feedback", "nearest", "feedback")
    assert mean_log_error(uniform) < mean_log_error(nearest) - 0.3
    assert {layer.index_bits for layer in uniform.layers} == {11}
    assert len({layer["index_bits"] for layer in mixed["layers"]}) > 1
    # Tiny layers have few ways to spend the bits.
    assert mixed["nominal_bits_per_weight"] == pytest.approx(5.5, abs=0.1)
    for out in (calibrated, tmp_path / "nearest"):
        tensors = tensors_of(out)
        scales = [
            tensors[f"model.layers.0.self_attn.{part}_proj.input_scales"]
            for part in ("q", "k", "v")
        ]
        assert torch.equal(scales[0], scales[1]) and torch.equal(scales[0], scales[2])


def test_along_a_trellis(tiny_llama: Path, tmp_path: Path) -> None:
    """As many bits, in a new format version, with less error: calibrated or not."""
    for calibration in (DEFAULT_TEXT, None):
        reports = [
            quantize(
                tiny_llama,
                tmp_path / f"{code}-{calibration is None}",
                QuantizeRequest(calibration=calibration, rates="uniform", code=code),
            )
            for code in (PLAIN, TRELLIS)
        ]
        errors = [[report.error_of(layer) or 0 for layer in report.layers] for report in reports]
        gains = [one / other for other, one in zip(*errors, strict=True)]
        assert sum(gains) / len(gains) < 0.85
        assert reports[0].output_bytes == reports[1].output_bytes
        out = tmp_path / f"trellis-{calibration is None}"
        assert verify(out)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert (config["format_version"], config["code"]) == (2, "trellis")
        assert list(config["codebooks"]) == ["trellis-gaussian-2048-v1"]
        assert "trellis code" in inspect(out) and "trellis code" in (out / "README.md").read_text()


def test_scales_of_one_on_request(tiny_llama: Path, tmp_path: Path) -> None:
    request = QuantizeRequest(calibration_tokens=512, balance_scales=False)
    quantize(tiny_llama, tmp_path / "out", request)
    for name, tensor in tensors_of(tmp_path / "out").items():
        if name.endswith(".input_scales"):
            assert set(tensor.abs().tolist()) == {1.0}


def test_one_layer_over_two_shards_and_other_dtypes(tmp_path: Path, tiny_llama: Path) -> None:
    quantize(tiny_llama, tmp_path / "one", UNCALIBRATED)
    model = copy_model(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    # Every layer is in both files.
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: tensors[name].float() for name in weight_map if weight_map[name] == file}
        save_file(part, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quantize(model, tmp_path / "two", UNCALIBRATED)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].to(two[name].dtype), two[name]) for name in one)


def test_same_request_same_bytes(tiny_llama: Path, calibrated: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "again", LITTLE_CALIBRATION)
    assert files_of(tmp_path / "again") == files_of(calibrated)


def test_refused_before_any_work(tmp_path: Path, tiny_llama: Path, calibrated: Path) -> None:
    def refused(
        message: str,
        model: Path = tiny_llama,
        out: Path = tmp_path / "out",
        device: str = "auto",
        **options: Any,
    ) -> None:
        with pytest.raises(QamwError, match=message):
            quantize(model, out, QuantizeRequest(**{"calibration": None} | options), device=device)
        assert not (tmp_path / "out").exists()

    refused("already exists", out=calibrated)
    refused("must not be the model's own directory", out=tiny_llama)
    refused("nor inside it", out=tiny_llama / "nested" / "out")
    refused("device='nonsense': ", device="nonsense")
    refused("device='meta': expected auto, cpu or cuda", device="meta")
    refused("already a QAM-W checkpoint; start from the original model", model=calibrated)
    refused("its path is not UTF-8", out=tmp_path / "\udcff")
    (tmp_path / "loop").symlink_to("loop")
    refused("loop: a link that leads to itself", out=tmp_path / "loop")
    least = r"bpw=3.01: expected at least 3\.\d+: 3 for indices and the rest for norms"
    refused(least, bpw=3.01, calibration=DEFAULT_TEXT)
    refused(r"ignore=\['\*.nothing'\] matches no linear layer", ignore=["*.nothing"])
    refused("ignore all or none of them", ignore=["*.q_proj"])
    refused("leaves nothing to quantize", ignore=["*"])
    refused("no such file", model=tmp_path / "absent")
    refused("No such file", calibration=tmp_path / "absent.txt")
    (tmp_path / "short.txt").write_text("too short")
    refused("tokens, at least", calibration=tmp_path / "short.txt")


def test_what_does_not_fit_on_the_disk_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    (model / "notes.txt").touch()  # is copied; has a size, but takes no room
    os.truncate(model / "notes.txt", shutil.disk_usage(tmp_path).free + 10**9)
    with pytest.raises(QuantizeError, match=r"out: \d+.\d\d GB needed, \d+.\d\d GB free"):
        quantize(model, tmp_path / "out", UNCALIBRATED)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("request_", [UNCALIBRATED, QuantizeRequest()], ids=["plain", "calibrated"])
@pytest.mark.parametrize(
    "name, at",
    [
        ("model.layers.1.mlp.up_proj.weight", (3, 5)),
        ("model.embed_tokens.weight", (370, 2)),
        ("model.layers.0.input_layernorm.weight", (7,)),
    ],
)
def test_nan_is_refused_by_name(
    tmp_path: Path, tiny_llama: Path, request_: QuantizeRequest, name: str, at: tuple[int, ...]
) -> None:
    """Also where nothing is quantized."""
    model = copy_model(tiny_llama, tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    tensors[name][at] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorError, match=re.escape(f"{name}{list(at)} is nan")):
        quantize(model, tmp_path / "out", request_)
    assert not (tmp_path / "out" / "config.json").exists()
    after_layers = name.startswith("model.embed")  # when a shard is finished
    assert after_layers or not (tmp_path / "out").exists()


def test_width_without_whole_units_names_the_way_out(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "odd", "llama", intermediate_size=500)
    message = r"(?s)22% of the decoder.*down_proj.weight: 500 inputs, not a multiple of 64"
    with pytest.raises(QuantizeError, match=message):
        quantize(model, tmp_path / "out", UNCALIBRATED)
    request = QuantizeRequest(calibration=None, allow_partial=True)
    report = quantize(model, tmp_path / "out", request)
    assert not any(layer.name.endswith("down_proj") for layer in report.layers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.1.mlp.down_proj" in config["quantization_config"]["ignore"]


def test_rates(tmp_path: Path, tiny_llama: Path) -> None:
    errors = []
    for bpw in (3.0, 4.5, 6.0):
        request = QuantizeRequest(bpw=bpw, calibration=None)
        report = quantize(tiny_llama, tmp_path / str(bpw), request)
        errors.append(sum(layer.nmse for layer in report.layers) / len(report.layers))
        # Of tiny layers, what is stored besides the indices is a large part.
        assert report.effective_bits_per_weight == pytest.approx(bpw, abs=0.35)
    assert errors[0] > 7 * errors[1] > 49 * errors[2]


def test_a_write_that_fails_names_its_file(tmp_path: Path, tiny_llama: Path) -> None:
    """A full disk is no OSError to safetensors and torch."""
    message = r"out/model-00001-of-00002.safetensors: .*File too large.*resume=True continues"
    with file_size_limit(100_000), pytest.raises(QuantizeError, match=message):
        quantize(tiny_llama, tmp_path / "out", UNCALIBRATED)
    other = tmp_path / "other"  # another disk may be mounted there
    other.mkdir()
    message = f"{other}: the hidden states of the layers could not be written there: "
    with file_size_limit(100_000), pytest.raises(QuantizeError, match=message):
        quantize(tiny_llama, other, QuantizeRequest(calibration_tokens=512))
    assert not list(other.iterdir())


def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", vocab_size=300)
    message = r"produces token id 3\d\d from the text, but lm_head.weight has 300 rows"
    with pytest.raises(QuantizeError, match=message):
        quantize(model, tmp_path / "out")
