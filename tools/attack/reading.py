"""A reader of damaged checkpoints that shares no code with the project.

It tells two things about a directory. What it holds, to compare it with the original. And whether
someone may have *meant* it: a checkpoint with one other index bit, in a directory whose manifest
was made after that, is a sound checkpoint of another model, which nobody can tell from damage.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MOST_BYTES = 2**30  # of a file: nothing that large is meant

# Any value of these that fits the tensors makes a model.
_FREE_KEYS = frozenset(
    {
        *("attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range"),
        *("max_position_embeddings", "output_router_logits", "pad_token_id", "pretraining_tp"),
        *("rms_norm_eps", "rope_parameters", "rope_theta", "router_aux_loss_coef", "hidden_act"),
        *("router_jitter_noise", "transformers_version", "use_cache", "sliding_window"),
        *("num_experts_per_tok", "model_type", "architectures", "layer_types", "_name_or_path"),
        *("quantization_config", "tie_word_embeddings", "torch_dtype"),
        *("head_dim", "mlp_bias"),  # without them, transformers takes the same values
    }
)
_OWN_INPUT = ("o_proj", "down_proj")  # nothing else reads what these read


@dataclass(frozen=True)
class Content:
    """What a directory holds.

    Attributes:
        config: config.json.
        tensors: of all shards that the index names.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def same_as(self, other: "Content") -> bool:
        """Whether model and weights are the same, bit for bit."""
        return (
            json.dumps(self.config, sort_keys=True) == json.dumps(other.config, sort_keys=True)
            and self.tensors.keys() == other.tensors.keys()
            and all(same_bits(t, other.tensors[name]) for name, t in self.tensors.items())
        )


def read_content(directory: Path) -> Content:
    """Read a directory; it raises whatever Python and safetensors do where that is not possible."""
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    files = [path.name for path in directory.glob("*.safetensors")]
    if (directory / INDEX).exists():
        files = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in load_file(directory / file).items():
            if name in tensors:
                raise ValueError(f"{name} is there twice")
            tensors[name] = tensor
    return Content(config, tensors)


def try_to_read(directory: Path) -> Content | None:
    """:func:`read_content`, or None where there is nothing that can be read."""
    files = [path for path in directory.iterdir() if not path.is_dir()]
    if not all(path.is_file() and path.stat().st_size < MOST_BYTES for path in files):
        return None  # a FIFO would never end
    try:
        return read_content(directory)
    except BaseException as error:  # also a panic of the Rust library
        if isinstance(error, KeyboardInterrupt):
            raise
        return None


def may_be_meant(original: Content, changed: Content | None) -> bool:
    """Whether a changed checkpoint, plain or quantized, is a sound one of another model."""
    if changed is None or changed.tensors.keys() != original.tensors.keys():
        return False
    return _config_is_sound(original.config, changed.config) and all(
        _tensor_is_sound(name, tensor, changed.tensors[name])
        for name, tensor in original.tensors.items()
    )


def _config_is_sound(original: Mapping[str, Any], changed: Mapping[str, Any]) -> bool:
    if not isinstance(changed, dict):
        return False
    different = {k for k in {*original, *changed} if original.get(k) != changed.get(k)}
    if not {k for k in different if k in original} <= _FREE_KEYS:
        return False
    if "quantization_config" not in original:
        return "quantization_config" not in changed
    return _quantization_is_sound(
        original["quantization_config"], changed.get("quantization_config")
    )


def _quantization_is_sound(original: Mapping[str, Any], changed: Any) -> bool:
    """Another rotation is another model; whatever else is changed does not fit the tensors."""
    key = "rotation_block_sizes"
    if not isinstance(changed, dict) or {**original, key: 0} != {**changed, key: 0}:
        return False
    sizes = changed.get(key)
    return (
        isinstance(sizes, dict)
        and sizes.keys() >= original[key].keys()
        and all(k.isdecimal() and type(size) is int and size > 0 for k, size in sizes.items())
        and all(int(k) % size == 0 for k, size in sizes.items())
    )


def _tensor_is_sound(name: str, original: torch.Tensor, changed: torch.Tensor) -> bool:
    if changed.shape != original.shape:
        return False
    if same_bits(original, changed):
        return True
    module, _, suffix = name.rpartition(".")
    if suffix == "qweight":
        return changed.dtype == original.dtype  # any bits are indices
    if suffix == "row_norms":
        return changed.dtype == original.dtype and bool(((changed >= 0) & changed.isfinite()).all())
    if suffix == "input_scales":
        normal = changed.isfinite() & (changed.abs() >= torch.finfo(torch.float16).tiny)
        shared = module.rpartition(".")[2] not in _OWN_INPUT
        return changed.dtype == original.dtype and bool(normal.all()) and not shared
    return changed.dtype.is_floating_point and bool(changed.isfinite().all())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same; NaN is the same as NaN, -0 is not the same as 0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(bytes_of(a), bytes_of(b))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory, as uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def digest(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> dict[str, str]:
    """A short text for every tensor, and the texts themselves, to compare what doors deliver."""
    found = {
        name: f"{tensor.dtype} {list(tensor.shape)} "
        f"{hashlib.sha256(bytes_of(tensor).numpy().tobytes()).hexdigest()}"
        for name, tensor in tensors.items()
    }
    return found | dict(texts)
