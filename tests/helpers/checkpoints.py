"""What tests read of a checkpoint directory, and what they damage in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat
from qamw_kernels.format.manifest import MANIFEST, FileEntry, Manifest
from qamw_kernels.format.weight import QuantizedWeight

SMALL_SHARDS = 150_000  # bytes: several shards even for a tiny model
LITTLE_CALIBRATION = QuantizeRequest(calibration_tokens=2048, max_shard_bytes=SMALL_SHARDS)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def files_of(directory: Path) -> dict[str, bytes]:
    """The bytes of all files of a directory by path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def quantized_weight(directory: Path, module: str) -> QuantizedWeight:
    """What a QAM-W checkpoint stores of one linear layer."""
    tensors = tensors_of(directory)
    config = json.loads((directory / "config.json").read_text())
    qamw_format = QamwFormat.from_dict(config["quantization_config"])
    stored = {suffix: tensors[f"{module}.{suffix}"] for suffix in LAYER_TENSORS}
    return qamw_format.weight_of(module, stored)


def decoded(directory: Path, module: str) -> torch.Tensor:
    """The weight [N, K] float32 that a QAM-W checkpoint stands for."""
    return decode_weight(quantized_weight(directory, module))


def change_tensor(
    directory: Path,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
) -> None:
    """Replace one tensor of a checkpoint, or drop it where ``change`` returns None."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            changed = change(tensors.pop(name))
            kept = tensors if changed is None else {**tensors, name: changed}
            save_file(kept, file, metadata={"format": "pt"})
            return
    raise AssertionError(f"{directory} has no {name}")


def change_quantization_config(directory: Path, **changes: Any) -> None:
    """Change entries of ``quantization_config`` in a checkpoint's config.json."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def sign(directory: Path) -> None:
    """Have the manifest list every file as it is now."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    entries = {
        path.relative_to(directory).as_posix(): FileEntry.of(path)
        for path in files
        if path.name != MANIFEST
    }
    (directory / MANIFEST).write_text(json.dumps(Manifest(entries).to_dict()))
