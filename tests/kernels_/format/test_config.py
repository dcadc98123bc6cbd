"""config.json's quantization_config: what it describes, and what is refused."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from qamw_kernels.errors import FormatError, QamwError, TensorError
from qamw_kernels.format.config import QamwFormat, layer_tensors

GOOD = QamwFormat(11, {576: 64, 1536: 128}, {"model.layers.0.mlp.down_proj": 8}, ("lm_head",))


def test_round_trip_through_json() -> None:
    assert QamwFormat.from_dict(json.loads(json.dumps(GOOD.to_dict()))) == QamwFormat(
        11, {576: 64, 1536: 128}, {"model.layers.0.mlp.down_proj": 8}, ("lm_head",)
    )


def test_only_the_trellis_needs_a_newer_reader() -> None:
    assert GOOD.to_dict()["format_version"] == 1 and "code" not in GOOD.to_dict()
    trellis = dataclasses.replace(GOOD, code="trellis", codebooks={})
    stored = json.loads(json.dumps(trellis.to_dict()))
    assert (stored["format_version"], stored["code"]) == (2, "trellis")
    assert sorted(stored["codebooks"]) == ["trellis-gaussian-2048-v1", "trellis-gaussian-256-v1"]
    assert QamwFormat.from_dict(stored) == trellis
    plain = GOOD.to_dict() | {"format_version": 2, "code": "plain"}
    assert QamwFormat.from_dict(plain) == GOOD


def test_mixed_rates_name_both_codebooks() -> None:
    assert sorted(GOOD.codebooks) == ["circular-gaussian-2048-v1", "circular-gaussian-256-v1"]
    assert GOOD.index_bits_of("model.layers.0.mlp.down_proj") == 8
    assert GOOD.index_bits_of("model.layers.1.mlp.down_proj") == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'qamw', got 'gptq'"),
        ({"format_version": 3}, "format_version 3 is not supported, .* qamw reads 1 and 2"),
        ({"format_version": 2}, r"missing keys \['code'\]"),
        ({"format_version": 2, "code": "turbo"}, "code: expected one of plain, trellis, got 'tur"),
        ({"format_version": 2, "code": ["plain"]}, r"code: expected .*, got \['plain'\]"),
        ({"format_version": 2, "code": "trellis"}, "codebooks: this version of qamw ships"),
        ({"code": "plain"}, r"unknown keys \['code'\]"),
        ({"index_bits": 13}, r"index bits must be in 6\.\.12, got 13"),
        ({"index_bits": "11"}, "got '11'"),
        ({"index_bits": True}, "got True"),
        ({"layer_index_bits": {"a": 5}}, "a: index bits"),
        ({"index_bits": 99, "layer_index_bits": {"index_bits": 11}}, "index_bits: .* got 99"),
        ({"layer_index_bits": []}, "layer_index_bits must be a JSON object"),
        ({"ignore": "lm_head"}, "ignore must be a JSON array"),
        ({"rotation_block_sizes": {"100": 64}}, "100 inputs cannot be rotated"),
        ({"rotation_block_sizes": {"576": 128}}, "576 inputs cannot be rotated in blocks of 128"),
        *(
            ({"rotation_block_sizes": {key: 64}}, "a number of inputs as a key, got ")
            for key in ("x", "1_28", "+128", " 128 ", "0128", "0", "\u0661\u0662\u0668", "9" * 5000)
        ),
        ({"rotation_block_sizes": {"576": 64.0}}, r"576 inputs .* in blocks of 64\.0"),
        ({"rotation_block_sizes": {"576": "64"}}, "576 inputs .* in blocks of '64'"),
        ({"rotation_block_sizes": {"576": [64]}}, r"576 inputs .* in blocks of \[64\]"),
        ({"format_version": True}, "format_version True is not supported"),
        ({"format_version": 1.0}, r"format_version 1\.0 is not supported"),
        ({"index_bits": 11.0}, r"got 11\.0"),
        ({"layer_index_bits": {"a": 8.0}}, r"a: index bits .* got 8\.0"),
        ({"layer_index_bits": {"a": [8]}}, r"a: index bits .* got \[8\]"),
        ({"ignore": ["a", "b", "a"]}, "ignore names a more than once"),
        ({"ignore": ["model.layers.0.mlp.down_proj"]}, "down_proj keeps its plain weight, but"),
        (
            {"ignore": ["x.experts.3.up"], "layer_index_bits": {"x.experts.*.up": 8}},
            r"x\.experts\.3\.up keeps its plain weight, but",
        ),
        ({"rotation_block_sizes": {"576": 64.9}}, "576 inputs cannot be rotated"),
        ({"ignore": [1]}, "ignore must hold module names"),
        ({"codebooks": {}}, "codebooks must name"),
        ({"codebooks": {"circular-gaussian-2048-v1": "00"}}, "the checkpoint needs"),
        ({"stacks": {"experts.down_proj": [64]}}, "expected two or three sizes, got"),
        ({"stacks": {"experts.down_proj": [4, 64, 64.0]}}, "expected two or three sizes, got"),
        ({"stacks": {"experts.down_proj": 4}}, "stacks must map names to shapes"),
        ({"stacks": []}, "stacks must map names to shapes"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        QamwFormat.from_dict(GOOD.to_dict() | change)


def test_only_objects_are_read() -> None:
    config: Any = [GOOD.to_dict()]
    with pytest.raises(FormatError, match="quantization_config must be a JSON object, got list"):
        QamwFormat.from_dict(config)


def test_stacks_are_optional() -> None:
    assert "stacks" not in GOOD.to_dict()
    stacked = dataclasses.replace(GOOD, stacks={"experts.down_proj": (4, 64, 64)})
    assert QamwFormat.from_dict(stacked.to_dict()) == stacked


def test_missing_key_is_refused() -> None:
    config = GOOD.to_dict()
    del config["ignore"]
    with pytest.raises(FormatError, match=r"missing keys \['ignore'\]"):
        QamwFormat.from_dict(config)


def test_unknown_width_names_the_module() -> None:
    message = r"o_proj: config\.json has no rotation block size for 640 inputs"
    with pytest.raises(FormatError, match=message):
        GOOD.rotation_block_size_of("o_proj", 640)


@pytest.mark.parametrize(
    ("suffix", "wrong"),
    [
        ("row_norms", torch.ones(64, dtype=torch.bfloat16)),
        ("input_scales", torch.ones(128)),
        ("qweight", torch.ones(10, 63, 2, dtype=torch.int32)),
        ("qweight", torch.ones(10, 64, 3, dtype=torch.int32)),
    ],
)
def test_tensors_of_a_weight_fit_together(suffix: str, wrong: torch.Tensor) -> None:
    tensors = {x: torch.empty(y, dtype=z) for x, (y, z) in layer_tensors(64, 128, 10).items()}
    fmt = dataclasses.replace(GOOD, rotation_block_sizes={128: 64})
    assert fmt.weight_of("up_proj", tensors).shape == (64, 128)
    with pytest.raises(TensorError, match=rf"^up_proj\.{suffix} is torch\..*, expected torch\."):
        fmt.weight_of("up_proj", tensors | {suffix: wrong})


def test_a_format_error_is_for_users_and_a_value_error() -> None:
    """The command line shows a QamwError without a traceback; callers may catch ValueError."""
    assert issubclass(FormatError, QamwError) and issubclass(FormatError, ValueError)


def test_bytes_of_a_layer() -> None:
    """Llama-2-7B's down_proj at 5.5 bpw: 5.5 bits of indices, 32 / K of norms, 16 / N of scales."""
    tensors = layer_tensors(4096, 11008, 11)
    bits = 8 * sum(dtype.itemsize * math.prod(shape) for shape, dtype in tensors.values())
    assert bits / (4096 * 11008) == pytest.approx(5.5 + 32 / 11008 + 16 / 4096)
