"""What tests read of a checkpoint directory."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qamw_kernels.codec.encode import QuantizedWeight, decode_weight
from qamw_kernels.format.config import QamwFormat

SMALL_SHARDS = 150_000  # bytes: several shards even for a tiny model


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def decoded(directory: Path, module: str) -> torch.Tensor:
    tensors = tensors_of(directory)
    fmt = QamwFormat.from_dict(json.loads((directory / "config.json").read_text())["quantization_config"])
    scales = tensors[f"{module}.input_scales"]
    block = fmt.rotation_block_size_of(module, len(scales))
    return decode_weight(QuantizedWeight(tensors[f"{module}.qweight"], tensors[f"{module}.row_norms"], scales, block))
