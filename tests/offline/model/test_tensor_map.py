"""The map between a checkpoint and a model, with transformers as the judge."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import build_empty_model
from offline_quantize.model.runner import LayerRunner
from offline_quantize.model.tensor_map import Conversion
from offline_quantize.planning.plan import make_plan
from tests.architectures.build import architectures, build

# Renamed outside the layers, everywhere, and by a prefix; split; merged; transposed.
RENAMED = ("gpt_neox", "olmo_hybrid", "qwen3_vl", "glm4", "phimoe", "gemma3", "mistral3", "falcon")
# Experts in one tensor: with biases and alternating rows of gate and up; transposed, for sorted
# tokens; under other names; transposed on disk only; gates and ups in two tensors; without gates.
STACKED = ("gpt_oss", "llama4_text", "granitemoe", "qwen3_vl_moe", "step3p7", "nemotron_h")
NAMES = (*RENAMED, *STACKED)
IDS = torch.arange(20, 44).reshape(2, 12)


def reference(name: str, directory: Path) -> Any:
    import transformers

    model_class = getattr(transformers, architectures()[name].class_name)
    return model_class.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_parameters_and_outputs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = build(tmp_path / "model", name)
    expected, loaded = reference(name, directory), load_model(directory)
    parameters = dict(loaded.named_parameters())
    same = parameters.keys() & dict(expected.named_parameters()).keys()  # experts are taken apart
    assert len(same) > 10
    for parameter in same:
        assert torch.equal(parameters[parameter], expected.get_parameter(parameter)), parameter
    outputs = [model(input_ids=IDS).logits for model in (expected, loaded)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_layers_one_by_one_are_the_whole_model(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(build(tmp_path / "model", name))
    structure = find_structure(checkpoint)
    runner = LayerRunner(checkpoint, IDS, torch.device("cpu"), torch.float32)
    model = reference(name, checkpoint.directory)
    last = model.get_submodule(f"{structure.layers_name}.{len(structure.layers) - 1}")
    seen: list[torch.Tensor] = []

    def record(_: torch.nn.Module, __: object, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    last.register_forward_hook(record)
    model(input_ids=IDS, use_cache=False)
    for layer in structure.layers:
        runner.load(layer, layer.load(checkpoint))
        runner.advance(layer.index)
    torch.testing.assert_close(runner.hidden[0], seen[0], rtol=1e-4, atol=1e-4)


def test_a_matrix_that_is_split_while_loading_is_one_linear(tmp_path: Path) -> None:
    structure = find_structure(Checkpoint(build(tmp_path / "model", "glm4")))
    linear = next(x for x in structure.linears() if x.name.endswith("gate_up_proj"))
    assert linear.modules == (linear.name,)


def test_matrices_that_are_merged_are_linears_each(tmp_path: Path) -> None:
    checkpoint = Checkpoint(build(tmp_path / "model", "phimoe"))
    _, tensor_map = build_empty_model(checkpoint)
    structure = find_structure(checkpoint)
    experts = [x for x in structure.layers[0].linears() if x.routed]
    assert all(f"{x.name}.weight" in checkpoint.tensors for x in experts)
    assert {x.name.rpartition(".")[2] for x in experts} == {"w1", "w2", "w3"}
    (inside,) = {x.modules[0].split(".experts.")[0] for x in experts}
    assert experts[0].name.split(".experts.")[0] != inside  # the model names the block otherwise
    assert set(tensor_map.expected) == set(checkpoint.tensors)


def test_every_layer_asks_for_its_tensors(tiny_llama: Path) -> None:
    """Of 1000 layers and 100 thousand tensors, in seconds."""
    _, tensor_map = build_empty_model(Checkpoint(tiny_llama))
    names = [f"h.{number % 1000}.{number}.weight" for number in reversed(range(100_000))]
    tensor_map.replace([], [Conversion({f"t.{name}": (1,)}, {name: (1,)}) for name in names], [])
    start = time.process_time()
    found = [tensor_map.tensors_of(f"h.{layer}.") for layer in range(1000)]
    assert time.process_time() - start < 3
    assert {len(tensors) for tensors in found} == {100}
    assert found[7] == [f"t.{name}" for name in names if name.startswith("h.7.")]
    everything = [*Checkpoint(tiny_llama).tensors, *(f"t.{name}" for name in names)]
    assert sorted(tensor_map.tensors_of("")) == sorted(everything)


@pytest.mark.parametrize("name", ["phimoe", "qwen3_vl"])
def test_what_is_missing_has_the_name_that_it_would_have_on_disk(name: str, tmp_path: Path) -> None:
    directory = build(tmp_path / "model", name)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    lost = next(x for x in sorted(tensors) if ".layers.1." in x and x.endswith("proj.weight"))
    if name == "phimoe":
        lost = next(x for x in sorted(tensors) if "experts.2.w3" in x)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QuantizeError, match=f"no tensor {lost}, which the architecture"):
        make_plan(directory)
