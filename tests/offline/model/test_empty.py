"""Models are built of config.json only if the checkpoint can be one of them."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import build_empty_model
from offline_quantize.planning.plan import make_plan
from tests.architectures.build import build
from tests.helpers.models import copy_model


def changed(tiny_llama: Path, target: Path, **changes: object) -> Path:
    model = copy_model(tiny_llama, target)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    return model


@pytest.mark.parametrize("architectures", [["ViTForImageClassification"], ["Unknown"], [5], None])
def test_what_is_no_text_model_is_refused_in_one_line(
    architectures: object, tmp_path: Path, tiny_llama: Path
) -> None:
    other = {"model_type": "vit", "architectures": architectures, "num_hidden_layers": 2}
    model = changed(tiny_llama, tmp_path / "model", **other)
    with pytest.raises(QuantizeError, match="unsupported architecture") as caught:
        find_structure(Checkpoint(model))
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_architectures_and_model_type_agree(tmp_path: Path, tiny_llama: Path) -> None:
    """vLLM goes by the one, and transformers by the other."""
    model = changed(tiny_llama, tmp_path / "other", architectures=["Qwen2ForCausalLM"])
    message = "architectures has Qwen2ForCausalLM, but model_type is 'llama'"
    with pytest.raises(QuantizeError, match=message):
        make_plan(model)
    model = changed(tiny_llama, tmp_path / "unknown", architectures=["FooForCausalLM"])
    with pytest.raises(QuantizeError, match="unsupported architecture FooForCausalLM: expected"):
        make_plan(model)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    model = changed(tiny_llama, tmp_path / "model", model_type="llama99")
    expected = "config.json: unsupported architecture: model_type is 'llama99', expected one that"
    with pytest.raises(QuantizeError, match=expected):
        build_empty_model(Checkpoint(model))


def test_more_layers_than_tensors_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    """Before they are built, which would take hours."""
    model = changed(tiny_llama, tmp_path / "model", num_hidden_layers=1_000_000)
    expected = "config.json: num_hidden_layers is 1000000, but the checkpoint has only 21 tensors"
    with pytest.raises(QuantizeError, match=expected):
        build_empty_model(Checkpoint(model))


@pytest.mark.parametrize("name", ["hidden_size", "head_dim", "vocab_size"])
def test_a_model_far_larger_than_its_checkpoint_is_refused(
    name: str, tmp_path: Path, tiny_llama: Path
) -> None:
    """Before it is run: hidden states and tables of positions would take all memory."""
    model = changed(tiny_llama, tmp_path / "model", **{name: 2**28})
    expected = (
        "config.json: the model would have [0-9]{4,} million weights, but the checkpoint has "
        r"[0-9]+: [a-z0-9_.]+ has shape \[[0-9, ]+\], expected \[.*[0-9]{9}"
    )
    with pytest.raises(QuantizeError, match=expected):
        build_empty_model(Checkpoint(model))


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("vision_config", {"depth": 10**6}, "depth is 1000000, but the checkpoint has only 70"),
        ("vision_config", {"depth": 10**400}, "depth is 10{400}, but"),
        ("vision_config", {"deepstack_visual_indexes": [0] * 10**4}, "more than 10000 parameters"),
        ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 10{9}, but"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_that_no_checkpoint_has_tensors_for(
    section: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    """They are refused in seconds, wherever config.json has them."""
    model = build(tmp_path / "model", "qwen3_vl")
    config = json.loads((model / "config.json").read_text())
    config[section] |= changes
    (model / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.raises(QuantizeError, match=message):
        make_plan(model)
    assert time.process_time() - start < 30


def test_buffers_that_are_larger_than_the_checkpoint(tmp_path: Path) -> None:
    """Computing them would end in a process without memory."""
    model = changed(build(tmp_path / "gptj", "gptj"), tmp_path / "model", n_positions=10**9)
    with pytest.raises(QuantizeError, match=r"config.json: the model would have \d+.0 GB of buf"):
        make_plan(model)


@pytest.mark.parametrize(
    "changes", [{"base_model_tp_plan": ["rowwise"]}, {"quantization_config": ["qamw"]}]
)
def test_values_of_another_type_are_no_traceback(
    changes: dict[str, object], tmp_path: Path, tiny_llama: Path
) -> None:
    with pytest.raises(QuantizeError):
        make_plan(changed(tiny_llama, tmp_path / "model", **changes))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB."),
    ],
)
def test_memory_that_runs_out_is_no_fault_of_the_model(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained("unsupported architecture"):
        raise error
    assert caught.value is error


def test_what_a_model_raises_becomes_one_line() -> None:
    expected = "unsupported: ValueError: no no"
    with pytest.raises(QuantizeError, match=expected) as caught, explained("unsupported"):
        raise ValueError("no\n" * 999)
    assert len(str(caught.value)) < 400


def test_building_in_two_threads_leaves_the_process_as_it_was(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    build_empty_model(checkpoint)  # imports everything
    before = nn.Module.register_parameter, torch.get_default_dtype(), nn.init.normal_
    for _ in range(10):
        with ThreadPoolExecutor(2) as threads:
            built = list(threads.map(build_empty_model, [checkpoint] * 2))
        assert all(p.is_meta for model, _ in built for p in model.parameters())
        assert before == (nn.Module.register_parameter, torch.get_default_dtype(), nn.init.normal_)


def test_buffers_that_no_checkpoint_has_are_those_of_transformers(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = dict(AutoModelForCausalLM.from_pretrained(tiny_llama).named_buffers())
    built = dict(build_empty_model(Checkpoint(tiny_llama))[0].named_buffers())
    assert loaded and loaded.keys() == built.keys()
    for name, buffer in loaded.items():
        assert buffer.dtype == built[name].dtype and torch.equal(buffer, built[name]), name
