"""Quantized matrices that transformers merges or splits while loading them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import offline_quantize.transformers_quantizer  # noqa: F401  (registers the method)
from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.errors import TensorError
from tests.architectures.build import build
from tests.helpers.checkpoints import change_tensor, tensors_of
from tests.helpers.models import copy_model, tiny_model

# More than ten experts, which are not in the order of their names.
ELEVEN = {"num_local_experts": 11, "intermediate_size": 64}
MODELS: dict[str, Callable[[Path], Path]] = {
    # One tensor for every matrix on disk, under other names.
    "mixtral": lambda folder: tiny_model(folder, "mixtral", **ELEVEN),
    # One tensor for all experts, under another name; a tied head.
    "granitemoe": lambda folder: tiny_model(
        folder, "granitemoe", tie_word_embeddings=True, **ELEVEN
    ),
    # Transposed, with alternating rows of gate and up, and with biases.
    "gpt_oss": lambda folder: build(folder, "gpt_oss"),
    # One tensor for all gates, one for all ups, under other names; a vision tower.
    "step3p7": lambda folder: build(folder, "step3p7"),
    # No experts; a matrix on disk becomes several parameters.
    "hrm_text": lambda folder: tiny_model(folder, "hrm_text"),
}
GRANITE = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoints of ``MODELS`` by name, each made when it is asked for."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            model = MODELS[name](folder / f"{name}-plain")
            quantize(model, folder / name, QuantizeRequest(calibration=None))
        return folder / name

    return make


def load(directory: Path, dtype: torch.dtype = torch.bfloat16, auto: Any = None) -> Any:
    return (auto or AutoModelForCausalLM).from_pretrained(directory, dtype=dtype)


def assert_same_states(found: Any, expected: Any) -> None:
    states = found.state_dict()
    assert states.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(states[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_decoded_one(
    name: str, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = quantized(name)
    dequantize(checkpoint, tmp_path / "plain", torch.bfloat16)
    auto = None if name != "step3p7" else AutoModel
    assert_same_states(load(checkpoint, auto=auto), load(tmp_path / "plain", auto=auto))


@torch.no_grad()
def test_other_dtypes_and_no_head(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """Tensors with other names on disk get the dtype that was asked for, as all others."""
    checkpoint = quantized("granitemoe")
    dequantize(checkpoint, tmp_path / "plain", torch.float32)
    for auto in (AutoModelForCausalLM, AutoModel):
        found, expected = (
            load(directory, torch.float32, auto) for directory in (checkpoint, tmp_path / "plain")
        )
        assert {tensor.dtype for tensor in found.parameters()} == {torch.float32}
        assert_same_states(found, expected)
        ids = torch.arange(5, 25)[None]
        assert torch.equal(found(ids)[0], expected(ids)[0])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_ignored_experts(name: str, tmp_path: Path) -> None:
    model = build(tmp_path / "model", name)
    ignore = ("*layers.0.*experts*",)
    quantize(model, tmp_path / "out", QuantizeRequest(calibration=None, ignore=ignore))
    experts = {x for x in tensors_of(tmp_path / "out") if ".experts." in x}
    assert any(".1." in x and x.endswith(".qweight") for x in experts)
    assert not any("layers.0." in x and x.endswith(".qweight") for x in experts)
    dequantize(tmp_path / "out", tmp_path / "plain", torch.bfloat16)
    assert_same_states(load(tmp_path / "out"), load(tmp_path / "plain"))


def without(checkpoint: Path, directory: Path, pattern: str) -> Path:
    """A copy of a checkpoint that lacks all tensors whose names begin as a pattern says."""
    copy_model(checkpoint, directory)
    for file in directory.glob("*.safetensors"):
        kept = {name: x for name, x in load_file(file).items() if not re.match(pattern, name)}
        save_file(kept, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        (  # the last expert: none behind it tells that it is missing
            "mixtral",
            r"model.layers.1.block_sparse_moe.experts.10.w2",
            r"lacks model\.layers\.1\.block_sparse_moe\.experts\.10\.w2\.qweight, ",
        ),
        (
            "mixtral",
            r"model.layers.1.block_sparse_moe.experts.\d+.w1",
            r"model\.layers\.1\.mlp\.experts\.gate_up_proj cannot be made of .*experts\.0\.w3\.",
        ),
        ("granitemoe", rf"{GRANITE}.0.up_proj.row_norms", rf"lacks {GRANITE}.0.up_proj.row_norms$"),
        ("granitemoe", rf"{GRANITE}.3.down_proj", rf"lacks {GRANITE}.3.down_proj.qweight, "),
        ("granitemoe", rf"{GRANITE}.\d+.gate", rf"{GRANITE}.gate_up_proj cannot be made of "),
        ("granitemoe", rf"{GRANITE}.", rf"lacks {GRANITE}.gate_up_proj"),
    ],
)
def test_missing_experts_are_refused(
    name: str, missing: str, message: str, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    damaged = without(quantized(name), tmp_path / "damaged", missing)
    with pytest.raises(TensorError, match=message):
        load(damaged)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("qweight", lambda x: x[:-1], r"qweight is I32 .*, expected I32 \["),
        ("qweight", lambda x: x[0], r"qweight has shape .*, expected 3 dimensions"),
        ("row_norms", lambda x: x[:-1].clone(), r"row_norms is F32 \[\d+\], expected F32 \[\d+\]"),
        ("row_norms", lambda x: -x, r"row_norms: expected finite values, .* in row 0"),
    ],
)
def test_experts_that_cannot_be_are_refused(
    suffix: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    quantized: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    damaged = copy_model(quantized("granitemoe"), tmp_path / "damaged")
    change_tensor(damaged, f"{GRANITE}.2.down_proj.{suffix}", change)
    with pytest.raises(TensorError, match=rf"{GRANITE}\.2\.down_proj\.{message}"):
        load(damaged)


def test_a_matrix_of_another_shape_is_refused(
    quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    damaged = copy_model(quantized("granitemoe"), tmp_path / "damaged")
    for suffix in ("qweight", "row_norms"):  # its tensors agree with each other
        change_tensor(
            damaged,
            f"{GRANITE}.2.down_proj.{suffix}",
            lambda x: (x[:, :-1] if x.ndim == 3 else x[:-1]).clone(),
        )
    with pytest.raises(TensorError, match=rf"{GRANITE}.down_proj cannot be made of .* 2\.down"):
        load(damaged)
