"""GPT-2, whose weights are [inputs, rows], with transformers as the judge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import offline_quantize.transformers_quantizer  # noqa: F401  (registers the method)
from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.checkpoints.verify import verify
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.runner import LayerRunner
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.architectures.build import build
from tests.helpers.checkpoints import decoded, tensors_of
from tests.helpers.models import copy_model

IDS = torch.arange(20, 44).reshape(2, 12)
PROJECTION = "transformer.h.1.attn.c_proj"  # as many inputs as rows


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("gpt2") / "model", "gpt2")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def in_transformers(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(directory, dtype=dtype)


def test_the_model_is_that_of_transformers(gpt2: Path) -> None:
    expected = logits(in_transformers(gpt2, torch.float32))
    torch.testing.assert_close(logits(load_model(gpt2)), expected)


def test_the_form_that_is_published(gpt2: Path, tmp_path: Path) -> None:
    """Without the names' first part, and with causal masks that no version of today reads."""
    source = copy_model(gpt2, tmp_path / "source")
    shard = source / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(shard).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).bool() for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(tensors, shard)
    request = QuantizeRequest(calibration=None)
    quantize(source, tmp_path / "published", request)
    quantize(gpt2, tmp_path / "saved", request)
    expected = tensors_of(tmp_path / "saved")
    found = tensors_of(tmp_path / "published")
    assert len(found) == len(expected) + 4
    for name, tensor in expected.items():
        assert torch.equal(found[name.removeprefix("transformer.")], tensor), name


@torch.no_grad()
def test_layers_one_by_one_are_the_whole_model(gpt2: Path) -> None:
    checkpoint = Checkpoint(gpt2)
    structure = find_structure(checkpoint)
    runner = LayerRunner(checkpoint, IDS, torch.device("cpu"), torch.float32)
    for layer in structure.layers:
        runner.load(layer, layer.load(checkpoint))
        runner.advance(layer.index)
    model = in_transformers(gpt2, torch.float32)
    expected = model.transformer(input_ids=IDS, output_hidden_states=True).hidden_states
    normed = model.transformer.ln_f(runner.hidden[0])
    torch.testing.assert_close(normed, expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ignore", [(), ("*.attn.c_proj",)], ids=["all", "some are kept"])
def test_decoded_it_is_transposed_again(
    ignore: tuple[str, ...], gpt2: Path, tmp_path: Path
) -> None:
    request = QuantizeRequest(bpw=6, calibration=None, rates="uniform", ignore=ignore)
    quantize(gpt2, tmp_path / "out", request)
    verify(tmp_path / "out")
    dequantize(tmp_path / "out", tmp_path / "plain", torch.bfloat16)
    plain, source = tensors_of(tmp_path / "plain"), load_file(gpt2 / "model.safetensors")
    assert plain.keys() == source.keys()
    for name, tensor in plain.items():
        assert tensor.shape == source[name].shape
        error = (tensor.float() - source[name].float()).norm() / source[name].float().norm()
        assert error < 0.03, name
    assert torch.equal(plain[f"{PROJECTION}.weight"], source[f"{PROJECTION}.weight"]) == bool(
        ignore
    )
    if not ignore:
        weight = decoded(tmp_path / "out", PROJECTION)
        assert torch.equal(plain[f"{PROJECTION}.weight"], weight.T.bfloat16())

    model = in_transformers(tmp_path / "out", torch.bfloat16)
    expected = in_transformers(tmp_path / "plain", torch.bfloat16)
    assert torch.equal(logits(model), logits(expected))
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out")),
        logits(load_model(tmp_path / "plain")),
        rtol=0.02,
        atol=0.02,
    )
