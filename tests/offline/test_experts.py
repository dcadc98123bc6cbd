"""Mixtures of experts are quantized under their names on disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.engines import load_model
from offline_quantize.files import SINGLE
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.structure import InputGroup
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.format.index import INDEX
from tests.architectures.build import build
from tests.helpers.checkpoints import tensors_of
from tests.helpers.models import copy_model, tiny_model

UNCALIBRATED = QuantizeRequest(calibration=None)
BLOCK = "model.layers.0.mlp.experts"  # of gpt-oss

# Architecture -> the block of experts, and an expert's gate, up and down matrices.
NAMES = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}
ROUTERS = {
    "mixtral": "block_sparse_moe.gate",
    "qwen2_moe": "mlp.shared_expert_gate",
    "deepseek_v3": "mlp.gate",
}


def expert_groups(model: Path, architecture: str) -> tuple[InputGroup, InputGroup]:
    """The groups of all experts' gate and up matrices, and of their down matrices."""
    _, gate, _, down = NAMES[architecture]
    groups = find_structure(Checkpoint(model)).layers[1].groups
    first, second = (
        next(group for group in groups if group.name.endswith(f"experts.0.{name}"))
        for name in (gate, down)
    )
    return first, second


@pytest.mark.parametrize("architecture", list(NAMES))
def test_structure_of_experts(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(tmp_path / "model", architecture)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():  # taken apart, the experts compute what transformers' own do
        own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(load_model(model)(ids).logits, own, rtol=0, atol=1e-4)

    block, gate, up, _ = NAMES[architecture]
    first, second = expert_groups(model, architecture)
    prefix = f"model.layers.1.{block}."
    expected = [f"{expert}.{name}" for expert in range(4) for name in (gate, up)]
    assert [linear.name.removeprefix(prefix) for linear in first] == expected
    assert len({linear.reads for linear in first}) == 1
    assert [linear.counted for linear in first] == [True, False] * 4
    assert len({linear.reads for linear in second}) == 4
    assert all(linear.row_parallel and linear.counted for linear in second)


@pytest.mark.parametrize("architecture", list(NAMES))
def test_mixtures_of_experts(architecture: str, tmp_path: Path) -> None:
    """Experts share scales and rates; routers and gates are left alone."""
    model, out = tiny_model(tmp_path / "model", architecture), tmp_path / "out"
    if architecture == "mixtral":
        send_all_tokens_to_the_same_experts(model)
    request = QuantizeRequest(bpw=4.5, calibration_tokens=1024, window_tokens=128)
    report = quantize(model, out, request)
    assert verify(out) and report.nominal_bits_per_weight == pytest.approx(4.5, abs=0.15)

    first, second = expert_groups(model, architecture)
    layers, stored = {layer.name: layer for layer in report.layers}, tensors_of(out)
    for group in (first, second):
        assert len({layers[linear.name].index_bits for linear in group}) == 1
        shared = stored[f"{group.name}.input_scales"]
        assert all(torch.equal(stored[f"{x.name}.input_scales"], shared) for x in group)

    errors = {linear.name: layers[linear.name].output_nmse for linear in second}
    not_reached = [name for name, error in errors.items() if error is None]
    assert len(not_reached) == (2 if architecture == "mixtral" else 0)
    assert report.not_reached == not_reached
    card = (out / "README.md").read_text()
    assert ("No calibration token reached 2 of the layers" in card) == bool(not_reached)
    assert all(0 < error < 0.02 for error in errors.values() if error is not None)

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    own = [name for name in config["layer_index_bits"] if ".experts." in name]
    assert all(".experts.*." in name for name in own), "experts share one entry"
    assert f"model.layers.1.{ROUTERS[architecture]}" in config["ignore"]


def send_all_tokens_to_the_same_experts(model: Path) -> None:
    """A router of zeros prefers none of the experts, and takes the first two."""
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.gate.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})


def test_experts_that_compute_nothing_are_refused(tmp_path: Path) -> None:
    model = build(tmp_path / "moe", "longcat_flash")
    message = r"(?s)36% of the decoder's weights cannot be quantized:.*LongcatFlashExperts"
    with pytest.raises(QuantizeError, match=message):
        quantize(model, tmp_path / "out", UNCALIBRATED)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model, with its experts in one tensor, and its quantized form."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    model = build(folder / "model", "gpt_oss")
    quantize(model, folder / "quantized", UNCALIBRATED)
    return model, folder / "quantized"


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_vl_moe"])
def test_stacks_of_experts_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    """Apart when quantized; in one tensor of the same shape when decoded."""
    model, out, decoded = build(tmp_path / "model", name), tmp_path / "out", tmp_path / "decoded"
    quantize(model, out, UNCALIBRATED)
    dequantize(out, decoded)
    before, quantized, after = tensors_of(model), tensors_of(out), tensors_of(decoded)
    stacks = json.loads((out / "config.json").read_text())["quantization_config"]["stacks"]
    assert len(stacks) == 4 and stacks == {x: list(before[x].shape) for x in stacks}
    assert not stacks.keys() & quantized.keys()
    assert {x: tensor.shape for x, tensor in after.items()} == {
        x: tensor.shape for x, tensor in before.items()
    }
    for stack in stacks:
        difference = (after[stack].float() - before[stack].float()).norm()
        assert 0 < difference < 0.05 * before[stack].float().norm()


def test_stacks_that_are_ignored_stay_as_they_are(
    gpt_oss: tuple[Path, Path], tmp_path: Path
) -> None:
    model, out = gpt_oss[0], tmp_path / "out"
    request = QuantizeRequest(calibration=None, ignore=("*.layers.0.mlp.experts.*",))
    quantize(model, out, request)
    assert verify(out)
    stored, stack = tensors_of(out), f"{BLOCK}.gate_up_proj"
    assert torch.equal(stored[stack], tensors_of(model)[stack])
    assert not any(name.startswith(f"{BLOCK}.0.") for name in stored)
    assert f"{BLOCK}.0.gate_proj.qweight".replace("layers.0", "layers.1") in stored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lost", rf"no tensor {BLOCK}\.2\.up_proj\.weight"),
        ("one more", r"experts\.9\.up_proj\.qweight belongs to no linear layer"),
        ("bias", rf"no tensor {BLOCK}\.down_proj_bias"),
    ],
)
def test_damaged_stacks_are_noticed(
    change: str, message: str, gpt_oss: tuple[Path, Path], tmp_path: Path
) -> None:
    out = copy_model(gpt_oss[1], tmp_path / "out")
    tensors = tensors_of(out)
    for file in [*out.glob("*.safetensors"), out / INDEX]:
        file.unlink()
    own = {name: x for name, x in tensors.items() if name.startswith(f"{BLOCK}.2.up_proj.")}
    if change == "lost":
        tensors = {name: x for name, x in tensors.items() if name not in own}
    elif change == "one more":
        tensors |= {name.replace(".2.", ".9."): x.clone() for name, x in own.items()}
    else:
        del tensors[f"{BLOCK}.down_proj_bias"]
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    with pytest.raises(QuantizeError, match=message):
        verify(out, sign=True)
