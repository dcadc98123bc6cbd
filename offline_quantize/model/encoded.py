"""Tensors that a checkpoint holds quantized by another method, and how they are decoded.

A checkpoint in 8 bits or fewer is a model too: each of its weights is decoded when it is read, and
everything else takes it for a plain one. Found by names and headers alone; the methods are those of
``quantization_config`` in config.json.
"""

import functools
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.files import CONFIG

Shape = tuple[int, ...]
Parts = Mapping[str, torch.Tensor]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FP8_SCALES = ("_scale_inv", "_scale")  # behind the name of a weight
_OTHER_SCALES = ("activation_scale", "input_scale", "input_global_scale", "k_scale", "v_scale")
"""Of activations and caches, which a plain model does not have."""
_MXFP4_GROUP = 32  # inputs that share an exponent


class Stored(Protocol):
    """What a shard's header describes of a tensor."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Encoded:
    """A tensor of the model that is made from tensors of the checkpoint.

    Attributes:
        name: in a plain checkpoint.
        shape: of its values.
        dtype: that it is decoded to.
        parts: what ``decode`` calls a tensor -> its name in the checkpoint.
        decode: the values, from those of the parts.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    parts: Mapping[str, str]
    decode: Callable[[Parts], torch.Tensor]


@dataclass(frozen=True)
class Encoding:
    """How a checkpoint is quantized.

    Attributes:
        description: for people.
        tensors: that are decoded.
        dropped: names of tensors that a plain model does not have.
    """

    description: str
    tensors: tuple[Encoded, ...]
    dropped: frozenset[str]


def find_encoding(
    quantization: Mapping[str, Any], dtype: torch.dtype, stored: Mapping[str, Stored]
) -> Encoding | None:
    """How a checkpoint is quantized; None for a method that is not decoded here.

    Args:
        quantization: ``quantization_config`` of config.json.
        dtype: to decode to.
        stored: name -> header of all tensors.
    Raises:
        QuantizeError: the tensors contradict each other, or config.json.
    """
    method = quantization.get("quant_method")
    if method in ("fp8", "fbgemm_fp8") or (
        method == "modelopt" and quantization.get("quant_algo") == "FP8"
    ):
        found = list(_fp8_tensors(quantization, dtype, stored))
    elif method == "mxfp4":
        found = list(_mxfp4_tensors(dtype, stored))
    elif method == "compressed-tensors":
        with explained(f"{CONFIG}: quantization_config"):
            found = list(_compressed_tensors(quantization, dtype, stored))
    else:
        return None
    dropped = {part for tensor in found for part in tensor.parts.values()}
    dropped |= {name for name in stored if name.endswith(_OTHER_SCALES)}
    for name, info in stored.items():
        if info.dtype in FLOAT8 and name not in dropped:
            raise QuantizeError(f"{name}: {info.dtype}, but it has no scale")
    return Encoding(_description(quantization), tuple(found), frozenset(dropped))


def _description(quantization: Mapping[str, Any]) -> str:
    method, size = quantization["quant_method"], quantization.get("weight_block_size")
    if isinstance(size, list):
        return f"{method} in blocks of {' x '.join(map(str, size))}"
    if isinstance(quantization.get("format"), str):
        return f"{method} ({quantization['format']})"
    return str(method)


def _fp8_tensors(
    quantization: Mapping[str, Any], dtype: torch.dtype, stored: Mapping[str, Stored]
) -> Iterator[Encoded]:
    """Weights of 8 bits with a scale for all of it, for each row, or for each block.

    Experts may have two values of 4 bits in a byte, with a scale for 32 inputs (DeepSeek-V4).
    """
    block_size = quantization.get("weight_block_size")
    for name, info in stored.items():
        scale = _scale_of(name, stored)
        if scale is None:
            continue
        parts, shape = {"weight": name, "scale": scale}, info.shape
        if info.dtype in FLOAT8:
            block = _block(name, shape, stored[scale].shape, block_size)
            decode = functools.partial(_decode_fp8, block=block, dtype=dtype)
            yield Encoded(name, shape, dtype, parts, decode)
        elif info.dtype == torch.int8 and stored[scale].shape[-1] * _MXFP4_GROUP == 2 * shape[-1]:
            decode = functools.partial(_decode_mxfp4, dtype=dtype)
            yield Encoded(name, (*shape[:-1], 2 * shape[-1]), dtype, parts, decode)


def _scale_of(name: str, stored: Mapping[str, Stored]) -> str | None:
    """The name of the scales of a tensor, if it has any."""
    candidates = [f"{name}{suffix}" for suffix in _FP8_SCALES]
    candidates.append(f"{name.removesuffix('.weight')}.scale")
    return next((candidate for candidate in candidates if candidate in stored), None)


def _block(name: str, shape: Shape, scales: Shape, block_size: Any) -> tuple[int, int]:
    """Rows and inputs that share a scale.

    Raises:
        QuantizeError: the scales are neither of such blocks, nor of rows, nor one.
    """
    rows, inputs = shape[-2:]
    grid = (1, 1)
    if torch.Size(scales).numel() > 1:
        grid = (scales[-2], scales[-1]) if len(scales) > 1 else (scales[0], 1)
    candidates = []
    if 0 not in grid and rows % grid[0] == 0 == inputs % grid[1]:
        candidates.append((rows // grid[0], inputs // grid[1]))
    if block_size is not None:
        candidates.insert(0, _block_size(block_size))
    for block in candidates:
        if _grid(shape, block) == grid:
            return block
    expected = f" in blocks of {block_size}" if block_size else ""
    raise QuantizeError(
        f"{name}: scales of shape {scales} do not fit a weight of shape {shape}{expected}"
    )


def _block_size(value: Any) -> tuple[int, int]:
    """``weight_block_size`` of config.json."""
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and size > 0 for size in value)
    ):
        return value[0], value[1]
    raise QuantizeError(
        f"{CONFIG}: weight_block_size must be two positive integers, got {reprlib.repr(value)}"
    )


def _grid(shape: Shape, block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a matrix along its rows and inputs; the last ones may be cut off."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def _decode_fp8(parts: Parts, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """weight [..., N, K] times the scale of each block."""
    weight, scales = parts["weight"], parts["scale"]
    # Bytes are exponents.
    scales = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    if scales.numel() > 1:
        rows, inputs = weight.shape[-2:]
        scales = scales.reshape(*weight.shape[:-2], *_grid(weight.shape, block))
        scales = scales.repeat_interleave(block[0], -2)[..., :rows, :]
        scales = scales.repeat_interleave(block[1], -1)[..., :inputs]
    return (weight.float() * scales).to(dtype)


def _mxfp4_tensors(dtype: torch.dtype, stored: Mapping[str, Stored]) -> Iterator[Encoded]:
    """Experts [E, N, K] as blocks [E, N, K / 32, 16] and scales [E, N, K / 32] (gpt-oss).

    A plain checkpoint has them as [E, K, N].
    """
    for blocks, info in stored.items():
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == blocks or scales not in stored or info.dtype != torch.uint8:
            continue
        if len(info.shape) != 4 or stored[scales].shape != info.shape[:3]:
            raise QuantizeError(
                f"{blocks}: shape {info.shape}, and {stored[scales].shape} of {scales}: "
                "expected [experts, rows, groups, 16] and [experts, rows, groups]"
            )
        experts, rows, groups, num_bytes = info.shape
        decode = functools.partial(_decode_experts, dtype=dtype)
        shape = (experts, 2 * groups * num_bytes, rows)
        yield Encoded(name, shape, dtype, {"weight": blocks, "scale": scales}, decode)


def _decode_experts(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    packed = parts["weight"].flatten(2)
    decoded = _decode_mxfp4({"weight": packed, "scale": parts["scale"]}, dtype)
    return decoded.transpose(1, 2).contiguous()


def _decode_mxfp4(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Weights [..., N, K] of bytes [..., N, K / 2] with two values, and an exponent for 32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # slow to import

    *outer, rows, num_bytes = parts["weight"].shape
    groups = 2 * num_bytes // _MXFP4_GROUP
    blocks = parts["weight"].view(torch.uint8).reshape(-1, rows, groups, _MXFP4_GROUP // 2)
    exponents = parts["scale"].view(torch.uint8).reshape(-1, rows, groups)
    matrices = [  # one by one: what it needs meanwhile is many times as large
        convert_moe_packed_tensors(blocks[i : i + 1], exponents[i : i + 1], dtype=dtype)
        for i in range(len(blocks))
    ]
    return torch.cat(matrices).transpose(1, 2).reshape(*outer, rows, 2 * num_bytes)


def _compressed_tensors(
    quantization: Mapping[str, Any], dtype: torch.dtype, stored: Mapping[str, Stored]
) -> Iterator[Encoded]:
    """Whatever the package has a decompressor for; integers and floats of 4 to 8 bits mostly."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils.match import match_quantizable_tensors
    except ImportError:
        raise QuantizeError(
            "the checkpoint is quantized with compressed-tensors, and decoding it needs that "
            "package, 0.17 or newer: pip install compressed-tensors"
        ) from None
    config = QuantizationConfig.model_validate(dict(quantization))
    seen: set[str] = set()
    for scheme in config.config_groups.values():
        form = infer_module_format(torch.nn.Linear, scheme)
        compressor = BaseCompressor.get_value_from_registry(form.value)
        names = compressor.compression_param_names(scheme)
        decode = functools.partial(_decompress, compressor=compressor, scheme=scheme, dtype=dtype)
        for module, name in match_quantizable_tensors(
            stored, config.ignore or (), scheme.targets, param_targets=names[:1]
        ):
            parts = {x: f"{module}.{x}" for x in names if f"{module}.{x}" in stored}
            if module in seen or "weight_scale" not in parts:
                continue
            seen.add(module)
            shape = _unpacked_shape(stored[name], stored[parts["weight_scale"]], scheme.weights)
            yield Encoded(f"{module}.weight", shape, dtype, parts, decode)


def _unpacked_shape(packed: Stored, scales: Stored, weights: Any) -> Shape:
    """Of a weight whose values may share an int32 or a byte."""
    bits = {torch.int32: 32, torch.uint8: 8}.get(packed.dtype)
    if bits is None:
        return packed.shape
    rows, columns = packed.shape
    num_inputs = columns * (bits // weights.num_bits)
    if weights.group_size and scales.shape[-1] > 1:  # the last word may be filled up
        num_inputs = min(num_inputs, weights.group_size * scales.shape[-1])
    return rows, num_inputs


def _decompress(parts: Parts, compressor: Any, scheme: Any, dtype: torch.dtype) -> torch.Tensor:
    weight: torch.Tensor = compressor.decompress(dict(parts), scheme)["weight"]
    return weight.to(dtype)
