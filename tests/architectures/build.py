"""Tiny random checkpoints of the architectures in configs.json; the same ones every time."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.architectures.vision import can_read_images, write_processor
from tools.tiny_tokenizer import write_tiny_tokenizer

PROMPT = [20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130]
CONFIGS = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Architecture:
    """One entry of configs.json.

    Attributes:
        name: its key.
        class_name: of the transformers class from which its real checkpoints are saved.
        published: what ``architectures`` in the config.json of real checkpoints says.
        published_values: section of that config.json, empty for the top level -> its other values
            that vLLM reads and ``save_pretrained`` does not write.
        renames: pattern -> replacement, for tensor names that differ in real checkpoints from those
            that ``save_pretrained`` writes.
        transposed: patterns of the names of tensors whose last two dimensions are swapped in real
            checkpoints.
        values: of the transformers config, with those of text and tower in their own dictionaries.
        pooling: vLLM's task for a model without a language head, or None.
        unbuildable: why transformers cannot build it here, or None.
        allow_partial: whether it is quantized although much of it stays in 16 bits.
        image: its processor and the tokens that stand for an image; None for one that is served
            with text alone.
    """

    name: str
    class_name: str
    published: str
    published_values: dict[str, dict[str, Any]]
    renames: dict[str, str]
    transposed: list[str]
    values: dict[str, Any]
    pooling: str | None
    unbuildable: str | None
    allow_partial: bool
    image: dict[str, Any] | None


@cache
def architectures() -> dict[str, Architecture]:
    """All entries of configs.json by name, completed with the values that they share."""
    data = json.loads(CONFIGS.read_text())
    return {name: _complete(name, entry, data) for name, entry in data["architectures"].items()}


def _complete(name: str, entry: dict[str, Any], data: dict[str, Any]) -> Architecture:
    own = entry.get("config", {})
    if "text_config" in entry:
        values = {
            **data["wrapper"],
            **own,
            "text_config": {**data["decoder"], **entry["text_config"]},
            "vision_config": {**data["tower"], **entry["vision_config"]},
        }
    else:
        values = {**data["decoder"], **own}
    published = entry.get("published", entry["class"])
    return Architecture(
        name=name,
        class_name=entry["class"],
        published=published,
        published_values=entry.get("published_values", {}),
        renames=entry.get("renames", {}),
        transposed=entry.get("transposed", []),
        values=values,
        pooling=entry.get("pooling"),
        unbuildable=entry.get("unbuildable"),
        allow_partial=entry.get("allow_partial", False),
        image=entry.get("image"),
    )


def build(directory: Path, name: str) -> Path:
    """Write a tiny random checkpoint in bfloat16 with a tokenizer.

    Its tensors have the names that real checkpoints have on disk. No parameter is zero, so that the
    loss of any is noticed.

    Args:
        name: a key of configs.json.
    """
    import transformers

    architecture = architectures()[name]
    write_tiny_tokenizer(directory)
    model_class = getattr(transformers, architecture.class_name)
    config = model_class.config_class(**architecture.values)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state as it was
        torch.manual_seed(0)
        model = model_class._from_config(config, dtype=torch.bfloat16)
        for parameter_name, tensor in model.state_dict().items():
            _fill(parameter_name, tensor)
    model.save_pretrained(directory)
    if architecture.image and can_read_images():
        write_processor(directory, architecture.image)
    _publish(directory, architecture)
    return directory


@torch.no_grad()
def _fill(name: str, tensor: torch.Tensor) -> None:
    """Random values where a model is initialized with zeros, or with nothing at all."""
    if not tensor.is_floating_point():
        return
    if name.endswith("bias") or not tensor.any():
        tensor.normal_(std=0.2 if tensor.dim() == 1 else 0.06)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} is not finite")


def _publish(directory: Path, architecture: Architecture) -> None:
    """Change names, values and transposed tensors to what real checkpoints have."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["architectures"] = [architecture.published]
    for section, values in architecture.published_values.items():
        (config[section] if section else config).update(values)
    file.write_text(json.dumps(config, indent=2))
    if architecture.renames or architecture.transposed:
        shard = directory / "model.safetensors"
        tensors = {
            _renamed(name, architecture.renames): tensor.mT.contiguous()
            if any(re.search(pattern, name) for pattern in architecture.transposed)
            else tensor
            for name, tensor in load_file(shard).items()
        }
        save_file(tensors, shard, metadata={"format": "pt"})


def _renamed(name: str, renames: dict[str, str]) -> str:
    for pattern, replacement in renames.items():
        name = re.sub(pattern, replacement, name)
    return name
