"""Forms of compressed-tensors: what belongs to which group, and what is refused.

What they decode to is in ``test_encoded.py``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.errors import QuantizeError
from offline_quantize.model.checkpoint import Checkpoint
from tests.helpers.checkpoints import change_tensor
from tests.helpers.encoded import (
    compressed_checkpoint,
    encode_checkpoint,
    from_fp8,
    is_linear,
    to_fp8,
)
from tests.helpers.models import copy_model

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
MODULE = "model.layers.1.mlp.up_proj"  # [512, 256]


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> Path:
    return copy_model(tiny_llama, tmp_path / "model")


def change_settings(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` edit the ``quantization_config``."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def read(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(directory)
    return dict(checkpoint.load(checkpoint.tensors))


def is_near(directory: Path, plain: Path, tolerance: float) -> bool:
    """Whether all linears are what they were made from, but for rounding."""
    expected = load_file(plain / "model.safetensors")
    return all(
        (tensor - expected[name]).norm() < tolerance * expected[name].norm()
        for name, tensor in read(directory).items()
        if is_linear(name, tensor)
    )


@pytest.mark.parametrize("first", ["Linear", "named"])
def test_a_group_that_names_a_module_has_it(first: str, tiny_llama: Path, llama: Path) -> None:
    """In whichever order: 4 bits taken for 8, or 8 for 4, would have the right shape."""
    compressed_checkpoint(llama, "pack-quantized", INT4)
    fours = load_file(llama / "model.safetensors")
    other = copy_model(tiny_llama, llama.parent / "other")
    compressed_checkpoint(other, "pack-quantized", INT4 | {"num_bits": 8})
    eights = load_file(other / "model.safetensors")
    save_file(
        {k: v for k, v in fours.items() if "down_proj" not in k}
        | {k: v for k, v in eights.items() if "down_proj" in k},
        llama / "model.safetensors",
    )
    groups = {
        "Linear": {"targets": ["Linear"], "weights": INT4},
        "named": {"targets": ["re:.*down_proj"], "weights": INT4 | {"num_bits": 8}},
    }
    order = [first, *groups.keys() - {first}]
    change_settings(llama, lambda x: x.update(config_groups={k: groups[k] for k in order}))
    assert is_near(llama, tiny_llama, 0.12)


@pytest.mark.parametrize(
    ("form", "weights", "group"),
    [
        ("int-quantized", INT8, {}),
        ("int-quantized", INT8 | {"num_bits": 4}, {"input_activations": TOKENS}),
        ("pack-quantized", INT4, {"input_activations": TOKENS}),
    ],
)
def test_the_form_is_that_of_config_json(
    form: str, weights: dict[str, Any], group: dict[str, Any], tiny_llama: Path, llama: Path
) -> None:
    """The package would guess another one for these settings."""
    compressed_checkpoint(llama, form, weights, **group)
    assert is_near(llama, tiny_llama, 0.2)


def test_blocks_that_are_cut_off(llama: Path) -> None:
    """Rows and inputs are no multiples of the blocks."""
    expected = {}

    def encode(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not is_linear(name, tensor):
            return None
        weight, scales = to_fp8(tensor, 96, 160)
        expected[name] = from_fp8(weight, scales, 96, 160)
        return {name: weight, f"{name}_scale": scales}

    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [96, 160]}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    encode_checkpoint(llama, settings, encode)
    tensors = read(llama)
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_scales_of_activations_are_left_out(llama: Path) -> None:
    compressed_checkpoint(llama, "int-quantized", INT8, input_activations=TOKENS)
    shard = llama / "model.safetensors"
    names = ("input_scale", "input_zero_point", "output_scale")
    save_file(load_file(shard) | {f"{MODULE}.{x}": torch.ones(1) for x in names}, shard)
    assert not [name for name in Checkpoint(llama).tensors if name.endswith(names)]


@pytest.mark.parametrize(
    ("weights", "settings", "lacking"),
    [
        (INT4, {}, "weight_scale"),
        (INT4, {}, "weight_shape"),
        (INT4 | {"symmetric": False}, {}, "weight_zero_point"),
        (INT4, {"actorder": "group"}, "weight_g_idx"),
        (INT8 | {"symmetric": False}, {}, "weight_zero_point"),
    ],
)
def test_a_missing_part_is_refused(
    weights: dict[str, Any], settings: dict[str, Any], lacking: str, llama: Path
) -> None:
    form = "pack-quantized" if weights["num_bits"] == 4 else "int-quantized"
    compressed_checkpoint(llama, form, weights)
    if lacking != "weight_g_idx":
        change_tensor(llama, f"{MODULE}.{lacking}", lambda _: None)
    change_settings(llama, lambda x: x["config_groups"]["group_0"]["weights"].update(settings))
    with pytest.raises(QuantizeError, match=f"no tensor {lacking}, without which the others"):
        Checkpoint(llama)


@pytest.mark.parametrize(
    ("weights", "changed"),
    [
        (INT4, {"num_bits": 2}),
        (INT4, {"num_bits": 3}),
        (INT4, {"num_bits": 8}),
        (INT4, {"group_size": 64}),
        (INT4, {"strategy": "channel", "group_size": None}),
        (INT8, {"strategy": "tensor"}),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    weights: dict[str, Any], changed: dict[str, Any], llama: Path
) -> None:
    form = "pack-quantized" if weights["num_bits"] == 4 else "int-quantized"
    compressed_checkpoint(llama, form, weights)
    change_settings(llama, lambda x: x["config_groups"]["group_0"]["weights"].update(changed))
    with pytest.raises(QuantizeError, match=r"scales of shape .* not what config.json says"):
        Checkpoint(llama)


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_plain_weights_and_whole_scales_are_refused(part: str, llama: Path) -> None:
    """A model that was calibrated, but never compressed, has plain weights beside scales."""
    compressed_checkpoint(llama, "int-quantized", INT8, input_activations=TOKENS)
    dtype = torch.bfloat16 if part == "weight" else torch.int32
    change_tensor(llama, f"{MODULE}.{part}", lambda x: x.to(dtype))
    with pytest.raises(QuantizeError, match=rf"{MODULE}: .* not what config.json says"):
        Checkpoint(llama)


def test_rotated_weights_are_refused(llama: Path) -> None:
    """The model would have to rotate its activations."""
    compressed_checkpoint(llama, "pack-quantized", INT4)
    apply = [{"targets": ["embed_tokens"], "location": "weight_output"}]
    transform = {"config_groups": {"R1": {"type": "hadamard", "apply": apply}}}
    change_settings(llama, lambda x: x.update(transform_config=transform))
    with pytest.raises(QuantizeError, match="transform_config says that weights are rotated"):
        Checkpoint(llama)
