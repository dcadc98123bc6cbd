"""Weights in 8 and 4 bits that contradict their scales are refused, before any is read if it shows.

What they decode to otherwise is in ``test_encoded.py``.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.errors import QuantizeError
from offline_quantize.model.checkpoint import Checkpoint
from tests.architectures.build import build
from tests.helpers.checkpoints import change_tensor
from tests.helpers.encoded import (
    encode_checkpoint,
    fp8_checkpoint,
    from_fp8,
    mxfp4_checkpoint,
    to_fp8,
    to_mxfp4,
)
from tests.helpers.models import copy_model

Change = Callable[[torch.Tensor], torch.Tensor]
WEIGHT = "model.layers.1.mlp.up_proj.weight"  # [512, 256]
SCALES = f"{WEIGHT}_scale_inv"
DOWN = "model.layers.0.mlp.experts.down_proj"  # [4, 256, 256]


@pytest.fixture
def fp8(tiny_llama: Path, tmp_path: Path) -> Path:
    directory = copy_model(tiny_llama, tmp_path / "model")
    fp8_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build(tmp_path_factory.mktemp("mxfp4") / "model", "gpt_oss")
    mxfp4_checkpoint(directory)
    return directory


@pytest.mark.parametrize(
    "change",
    [
        lambda scales: scales.T.contiguous(),
        lambda scales: scales.repeat_interleave(2, 0).repeat_interleave(2, 1),
        lambda scales: scales[:0],
        lambda scales: scales[None],
        lambda scales: (1000 * scales).int(),
        lambda scales: scales > 0,
    ],
    ids=["transposed", "smaller blocks", "empty", "another dimension", "integers", "truth values"],
)
def test_scales_that_do_not_fit_are_refused(change: Change, fp8: Path) -> None:
    change_tensor(fp8, SCALES, change)
    with pytest.raises(QuantizeError, match=f"{WEIGHT}: scales of shape .* do not fit a weight"):
        Checkpoint(fp8)


def test_scales_that_contradict_weights_are_refused(fp8: Path) -> None:
    def load() -> None:
        list(Checkpoint(fp8).load([WEIGHT]))

    change_tensor(fp8, SCALES, lambda scales: -scales)
    with pytest.raises(QuantizeError, match=f"^{SCALES}: a scale is negative"):
        load()
    change_tensor(fp8, SCALES, torch.zeros_like)
    with pytest.raises(QuantizeError, match=f"^{WEIGHT}: a scale is zero, but its weights are not"):
        load()
    change_tensor(fp8, WEIGHT, torch.zeros_like)
    load()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", [(256,), ()])
def test_vectors_with_scales_are_refused(
    dtype: torch.dtype, shape: tuple[int, ...], fp8: Path
) -> None:
    change_tensor(fp8, WEIGHT, lambda _: torch.ones(shape).to(dtype))
    change_tensor(fp8, SCALES, lambda _: torch.ones(()))
    with pytest.raises(QuantizeError, match=f"{WEIGHT}: .* with a scale, but it is not a matrix"):
        Checkpoint(fp8)


@pytest.mark.parametrize("rows", [512, 511])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu])
def test_two_values_in_a_byte_need_exponents(rows: int, dtype: torch.dtype, fp8: Path) -> None:
    packed, exponents = to_mxfp4(torch.randn(512, 256))
    change_tensor(fp8, WEIGHT, lambda _: packed.view(torch.int8))
    change_tensor(fp8, SCALES, lambda _: exponents[:rows].to(dtype))
    if rows == 512 and dtype == torch.float8_e8m0fnu:
        list(Checkpoint(fp8).load([WEIGHT]))
        return
    with pytest.raises(
        QuantizeError, match=rf"{SCALES}: .* expected exponents of shape \(512, 8\)"
    ):
        Checkpoint(fp8)


def test_blocks_are_of_128_where_config_does_not_say(tiny_llama: Path, tmp_path: Path) -> None:
    """As for transformers; a scale for each expert of a stack has another name."""
    directory = copy_model(tiny_llama, tmp_path / "model")
    weight, scales = to_fp8(torch.randn(512, 256), 128, 128)
    experts, name = torch.stack([weight, weight]), "model.layers.1.mlp.experts.up_proj"

    def encode(found: str, _: torch.Tensor) -> dict[str, torch.Tensor] | None:
        stack = {name: experts, f"{name}_weight_scale": torch.ones(())}
        return {WEIGHT: weight, SCALES: scales, **stack} if found == WEIGHT else None

    encode_checkpoint(directory, {"quant_method": "fp8"}, encode)
    tensors = dict(Checkpoint(directory).load([WEIGHT, name]))
    assert torch.equal(tensors[WEIGHT], from_fp8(weight, scales, 128, 128))
    assert torch.equal(tensors[name], experts.bfloat16())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", torch.Tensor.float, "scales: torch.float32 .* expected exponents"),
        ("scales", lambda x: x[:, :-1].contiguous(), "scales: .* expected exponents"),
        ("scales", lambda x: x.view(torch.int8), "scales: torch.int8 .* expected exponents"),
        ("blocks", lambda x: x.unflatten(3, (2, 8)).flatten(2, 3), "blocks: .* groups, 16"),
        ("blocks", lambda x: x.flatten(2), "blocks: .* groups, 16"),
    ],
    ids=["floats", "fewer", "signed", "groups of 16", "flat"],
)
def test_mxfp4_of_other_forms_is_refused(
    part: str, change: Change, message: str, gpt_oss: Path, tmp_path: Path
) -> None:
    directory = copy_model(gpt_oss, tmp_path / "model")
    change_tensor(directory, f"{DOWN}_{part}", change)
    if part == "blocks":  # the scales would fit
        change_tensor(directory, f"{DOWN}_scales", lambda x: x.repeat_interleave(2, -1))
    with pytest.raises(QuantizeError, match=f"{DOWN}_{message}"):
        Checkpoint(directory)


def test_a_weight_that_is_there_plain_too_is_refused(gpt_oss: Path, tmp_path: Path) -> None:
    directory = copy_model(gpt_oss, tmp_path / "model")
    shard = directory / "model.safetensors"
    save_file(load_file(shard) | {DOWN: torch.ones(4, 256, 256).bfloat16()}, shard)
    with pytest.raises(QuantizeError, match=f"{DOWN} is there twice: plain, and as {DOWN}_blocks"):
        Checkpoint(directory)
