"""How a checkpoint is quantized by another method, and which tensors of it are decoded.

Each weight of a checkpoint in 8 bits or fewer is decoded when it is read, so that all other code
sees a plain checkpoint. Such weights are found by names and headers alone; the method is that of
``quantization_config`` in config.json.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offline_quantize.errors import QuantizeError
from offline_quantize.files import CONFIG
from offline_quantize.model.encoded_compressed import compressed_tensors
from offline_quantize.model.encoded_floats import fp8_tensors, mxfp4_tensors
from offline_quantize.model.encoded_tensor import FLOAT8, Encoded, Stored

_OF_ACTIVATIONS = re.compile(  # and of caches: a plain model has no such scales
    r"[._](activation_scale|input_scale(_ub)?|input_global_scale|output_scale|[qkv]_scale|kv_scale"
    r"|(input|output|k|v)_zero_point)$"
)


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
    """How a checkpoint is quantized; None if it is not, or by a method that is not decoded here.

    Args:
        quantization: ``quantization_config`` of config.json; empty if there is none.
        dtype: to decode to.
        stored: name -> header of all tensors.
    Raises:
        QuantizeError: the tensors contradict each other, or config.json.
    """
    method, found = quantization.get("quant_method"), list[Encoded]()
    if method in ("fp8", "fbgemm_fp8") or (
        method == "modelopt" and quantization.get("quant_algo") == "FP8"
    ):
        found += fp8_tensors(quantization, dtype, stored)
    elif method == "mxfp4":
        found += mxfp4_tensors(dtype, stored)
    elif method == "compressed-tensors":
        found += compressed_tensors(quantization, dtype, stored)
    elif quantization:
        return None
    dropped = {part for tensor in found for part in tensor.parts.values()}
    dropped |= {name for name in stored if quantization and _OF_ACTIVATIONS.search(name)}
    _check(found, dropped, quantization, stored)
    if not quantization:
        return None
    return Encoding(describe(quantization), tuple(found), frozenset(dropped))


def _check(
    found: Iterable[Encoded],
    dropped: set[str],
    quantization: Mapping[str, Any],
    stored: Mapping[str, Stored],
) -> None:
    """Refuse what is encoded otherwise than config.json says, or not at all, or twice.

    Raises:
        QuantizeError: names a tensor.
    """
    for name, info in stored.items():
        if info.dtype in FLOAT8 and name not in dropped:
            lacking = "it has no scale" if quantization else f"{CONFIG} has no quantization_config"
            raise QuantizeError(f"{name}: {info.dtype}, but {lacking}")
    if quantization and not found:
        raise QuantizeError(
            f"{CONFIG}: quantization_config says {describe(quantization)}, but no tensor is "
            "quantized in this way; if the weights are not quantized, remove quantization_config"
        )
    plain = stored.keys() - dropped
    for tensor in found:
        if tensor.name in plain:
            parts = ", ".join(tensor.parts.values())
            raise QuantizeError(f"{tensor.name} is there twice: plain, and as {parts}")


def describe(quantization: Mapping[str, Any]) -> str:
    """A ``quantization_config`` in words."""
    method = quantization.get("quant_method", "an unknown method")
    for key in ("quant_algo", "format"):
        if isinstance(quantization.get(key), str):
            return f"{method} ({quantization[key]})"
    size = quantization.get("weight_block_size")
    if method == "fp8" and isinstance(size, list):
        return f"{method} in blocks of {' x '.join(map(str, size))}"
    return str(method)
