"""Weights in 8 bits with a scale (fp8), or in 4 with exponents (MXFP4)."""

import functools
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from offline_quantize.errors import QuantizeError
from offline_quantize.files import CONFIG
from offline_quantize.model.encoded_tensor import FLOAT8, Encoded, Parts, Shape, Stored

_FP8_SCALES = ("_scale_inv", "_scale", "_weight_scale")  # after the name of a weight
_BLOCK_SIZE = [128, 128]  # transformers' default, where config.json has none
_MXFP4_GROUP = 32  # inputs that share an exponent
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
SCALES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, *FLOAT8, *_EXPONENTS)


def fp8_tensors(
    quantization: Mapping[str, Any], dtype: torch.dtype, stored: Mapping[str, Stored]
) -> Iterator[Encoded]:
    """Weights of 8 bits, with one scale, one for each row or column, or one for each block.

    Experts may have two values of 4 bits in a byte, with a scale for 32 inputs (DeepSeek-V4).

    Raises:
        QuantizeError: scales do not fit their weight.
    """
    size = quantization.get("weight_block_size")
    block_size = _block_size(_BLOCK_SIZE if size is None else size)
    for name, info in stored.items():
        scale = _scale_of(name, stored)
        if scale is None or info.dtype not in (*FLOAT8, torch.int8):
            continue
        if len(info.shape) < 2:
            raise QuantizeError(f"{name}: {info.dtype} with a scale, but it is not a matrix")
        parts, shape, scales = {"weight": name, "scale": scale}, info.shape, stored[scale]
        if info.dtype == torch.int8:
            _check_exponents(name, scale, scales, (*shape[:-1], 2 * shape[-1] // _MXFP4_GROUP))
            decode = functools.partial(decode_mxfp4, dtype=dtype)
            yield Encoded(name, (*shape[:-1], 2 * shape[-1]), dtype, parts, decode)
        else:
            block = _block(name, shape, scales, block_size)
            decode = functools.partial(decode_fp8, block=block, dtype=dtype)
            yield Encoded(name, shape, dtype, parts, decode)


def _scale_of(name: str, stored: Mapping[str, Stored]) -> str | None:
    """The name of the scales of a tensor, if it has any."""
    candidates = [f"{name}{suffix}" for suffix in _FP8_SCALES]
    candidates.append(f"{name.removesuffix('.weight')}.scale")
    return next((candidate for candidate in candidates if candidate in stored), None)


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


def _block(name: str, shape: Shape, scales: Stored, block_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and inputs that share a scale.

    Raises:
        QuantizeError: there is neither one scale, nor one per block, row or column.
    """
    rows, inputs = shape[-2:]
    if scales.dtype in SCALES:
        if torch.Size(scales.shape).numel() == 1:
            return rows, inputs
        if scales.shape == shape[:-1]:
            return 1, inputs
        for block in (block_size, (1, inputs), (rows, 1)):
            if scales.shape == (*shape[:-2], *grid(shape, block)):
                return block
    raise QuantizeError(
        f"{name}: scales of shape {scales.shape} and {scales.dtype} do not fit a weight of shape "
        f"{shape}: neither in blocks of {list(block_size)}, nor one for each row, nor one for all"
    )


def grid(shape: Shape, block: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks along the rows and the inputs of a matrix; the last may be smaller."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def decode_fp8(parts: Parts, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """weight [..., N, K] times the scale of each block.

    Raises:
        QuantizeError: a scale is zero, but not the weights that it is for.
    """
    weight, scales = parts["weight"].float(), parts["scale"]
    # Scales in bytes are exponents.
    scales = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    if scales.numel() > 1:
        rows, inputs = weight.shape[-2:]
        scales = scales.reshape(*weight.shape[:-2], *grid(weight.shape, block))
        scales = scales.repeat_interleave(block[0], -2)[..., :rows, :]
        scales = scales.repeat_interleave(block[1], -1)[..., :inputs]
    if ((scales == 0) & (weight != 0)).any():
        raise QuantizeError("a scale is zero, but its weights are not")
    return (weight * scales).to(dtype)


def mxfp4_tensors(dtype: torch.dtype, stored: Mapping[str, Stored]) -> Iterator[Encoded]:
    """Experts [E, N, K] as blocks [E, N, K / 32, 16] and scales [E, N, K / 32] (gpt-oss).

    A plain checkpoint has them as [E, K, N].

    Raises:
        QuantizeError: blocks and scales are of other shapes, or dtypes.
    """
    for blocks, info in stored.items():
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == blocks or scales not in stored or info.dtype != torch.uint8:
            continue
        if len(info.shape) != 4 or info.shape[3] != _MXFP4_GROUP // 2:
            raise QuantizeError(
                f"{blocks}: shape {info.shape}, expected [experts, rows, groups, 16]"
            )
        _check_exponents(blocks, scales, stored[scales], info.shape[:3])
        experts, rows, groups, num_bytes = info.shape
        decode = functools.partial(_decode_experts, dtype=dtype)
        shape = (experts, 2 * groups * num_bytes, rows)
        yield Encoded(name, shape, dtype, {"weight": blocks, "scale": scales}, decode)


def _check_exponents(name: str, scales: str, info: Stored, expected: Shape) -> None:
    if info.shape != expected or info.dtype not in _EXPONENTS:
        raise QuantizeError(
            f"{scales}: {info.dtype} of shape {info.shape}, expected exponents of shape "
            f"{expected} for {name}"
        )


def _decode_experts(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    packed = parts["weight"].flatten(2)
    decoded = decode_mxfp4({"weight": packed, "scale": parts["scale"]}, dtype)
    return decoded.transpose(1, 2).contiguous()


def decode_mxfp4(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Weights [..., N, K] from bytes [..., N, K / 2] of two values, and exponents, one per 32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # slow to import

    *outer, rows, num_bytes = parts["weight"].shape
    groups = 2 * num_bytes // _MXFP4_GROUP
    blocks = parts["weight"].view(torch.uint8).reshape(-1, rows, groups, _MXFP4_GROUP // 2)
    exponents = parts["scale"].view(torch.uint8).reshape(-1, rows, groups)
    matrices = [  # one by one: its temporaries are many times as large
        convert_moe_packed_tensors(blocks[i : i + 1], exponents[i : i + 1], dtype=dtype)
        for i in range(len(blocks))
    ]
    return torch.cat(matrices).transpose(1, 2).reshape(*outer, rows, 2 * num_bytes)
