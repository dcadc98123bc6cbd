"""Checkpoints in the forms of other quantization methods, made of plain ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP8_MAX = 448
GROUP = 32  # inputs with one exponent in MXFP4

Encode = Callable[[str, torch.Tensor], dict[str, torch.Tensor] | None]


def encode_checkpoint(directory: Path, quantization: dict[str, Any], encode: Encode) -> None:
    """Replace weights of the decoder layers, and set ``quantization_config`` in config.json.

    Args:
        quantization: ``quantization_config``.
        encode: gives the tensors that replace one; None leaves it as it is.
    """
    shard = directory / "model.safetensors"
    replaced: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(shard).items():
        encoded = encode(name, tensor) if ".layers." in name else None
        replaced |= {name: tensor} if encoded is None else encoded
    save_file(replaced, shard, metadata={"format": "pt"})
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": quantization}))


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether other methods quantize a tensor: it is a matrix, and not that of a router."""
    return name.endswith("proj.weight") and tensor.ndim == 2


def blocks_of(weight: torch.Tensor, rows: int, inputs: int) -> torch.Tensor:
    """weight [N, K] as [N / rows, rows, K / inputs, inputs], filled up with zeros."""
    more = (0, -weight.shape[1] % inputs, 0, -weight.shape[0] % rows)
    padded = torch.nn.functional.pad(weight.float(), more)
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // inputs, inputs)


def to_fp8(weight: torch.Tensor, rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 [N, K] and the float32 scales of its blocks."""
    blocks = blocks_of(weight, rows, inputs)
    scales = blocks.abs().amax((1, 3)) / FP8_MAX
    scaled = blocks / scales[:, None, :, None]
    padded = scaled.view(blocks.shape[0] * rows, -1)
    return padded[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn), scales


def from_fp8(weight: torch.Tensor, scales: torch.Tensor, rows: int, inputs: int) -> torch.Tensor:
    """What float8 and scales stand for, each element with the scale of its block."""
    i, j = (torch.arange(size) for size in weight.shape)
    return (weight.float() * scales[i[:, None] // rows, j // inputs]).bfloat16()


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [..., N, K / 2] with two values each, and exponents [..., N, K / 32] as bytes."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    exponents = groups.abs().amax(-1).clamp(min=2**-120).log2().floor() - 2
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - FP4_VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    codes = codes.to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def from_mxfp4(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """What bytes and exponents stand for."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    values = FP4_VALUES[codes & 7] * (1 - 2 * (codes >> 3))
    scales = (exponents.float() - 127).exp2()
    return (values.unflatten(-1, (-1, GROUP)) * scales[..., None]).flatten(-2).bfloat16()


def fp8_checkpoint(directory: Path, block: tuple[int, int] = (128, 128)) -> None:
    """As DeepSeek-V3, Qwen and MiniMax publish them."""

    def encode(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not is_linear(name, tensor):
            return None
        weight, scales = to_fp8(tensor, *block)
        return {name: weight, f"{name}_scale_inv": scales}

    settings = {"activation_scheme": "dynamic", "weight_block_size": list(block)}
    encode_checkpoint(directory, {"quant_method": "fp8", "fmt": "e4m3"} | settings, encode)


def mxfp4_checkpoint(directory: Path) -> None:
    """As gpt-oss is published: experts [E, K, N] as blocks and scales of [E, N, K]."""

    def encode(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        packed, exponents = to_mxfp4(tensor.mT)
        blocks = packed.unflatten(-1, (-1, GROUP // 2)).contiguous()
        return {f"{name}_blocks": blocks, f"{name}_scales": exponents}

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": [*kept, "lm_head"]}
    encode_checkpoint(directory, settings, encode)


def compressed_checkpoint(
    directory: Path, form: str, weights: dict[str, Any], **group: Any
) -> None:
    """As llm-compressor writes them, by compressed-tensors' own compressors.

    Args:
        form: of the package's, such as "pack-quantized".
        weights: settings of its scheme.
        group: further settings of the group.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = {"targets": ["Linear"], "weights": weights, **group}
    scheme = QuantizationScheme.model_validate(settings)
    arguments = QuantizationArgs.model_validate(weights)
    compressor = BaseCompressor.get_value_from_registry(form)

    def encode(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not is_linear(name, tensor):
            return None
        groups = tensor.unflatten(-1, (-1, arguments.group_size or tensor.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        state = {"weight": tensor, "weight_scale": scale, "weight_zero_point": zero}
        module = name.removesuffix(".weight")
        return {f"{module}.{x}": y for x, y in compressor.compress(state, scheme).items()}

    quantization = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": settings},
        "ignore": ["lm_head"],
    }
    encode_checkpoint(directory, quantization, encode)
