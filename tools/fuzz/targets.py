"""What is fuzzed: the parsers of what a stranger's checkpoint may hold; and the seeds.

A target is given the bytes of one JSON object, which may be damaged. It raises QamwError or
returns; anything else is a fault. What it accepts must be the same after writing and reading again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from offline_quantize.checkpoints.quantized import QuantizedCheckpoint
from offline_quantize.errors import is_out_of_memory
from offline_quantize.files import CONFIG, SINGLE
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from qamw_kernels.errors import QamwError
from qamw_kernels.files import read_json
from qamw_kernels.format.codebook import TRELLIS
from qamw_kernels.format.config import QUANT_METHOD, QamwFormat, layer_tensors
from qamw_kernels.format.index import INDEX, read_index
from qamw_kernels.format.manifest import MANIFEST, FileEntry, Manifest
from qamw_kernels.format.rates import index_bits_of_rate

_MOST_DATA = 2**16  # bytes behind a header
_ROWS, _INPUTS, _INDEX_BITS = 4, 64, 7
_FORMAT = QamwFormat(_INDEX_BITS, {_INPUTS: 16}, {"a.lm_head": 12}, ("embed",)).to_dict()
_FORMAT_2 = QamwFormat(_INDEX_BITS, {_INPUTS: 16}, ignore=("embed",), code=TRELLIS).to_dict()
_ENTRY = FileEntry("0" * 64, 1)


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        read: is called with the bytes, and with an empty folder of its own or what it left there.
        seed: an object that it accepts.
        slow: whether it takes so long that it would leave no time for others.
    """

    read: Callable[[bytes, Path], None]
    seed: dict[str, Any]
    slow: bool = False


def _read_format(data: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(data)
    content = QamwFormat.from_dict(read_json(folder / CONFIG)).to_dict()
    assert QamwFormat.from_dict(json.loads(json.dumps(content))).to_dict() == content


def _read_rate(data: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(data)
    index_bits_of_rate(read_json(folder / CONFIG).get("bits_per_weight"))


def _read_manifest(data: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(data)
    manifest = Manifest.read(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest.to_dict()))
    assert Manifest.read(folder) == manifest


def _read_index(data: bytes, folder: Path) -> None:
    (folder / INDEX).write_bytes(data)
    for file in read_index(folder).values():
        assert (folder / file).resolve().is_relative_to(folder.resolve())


def _read_header(data: bytes, folder: Path) -> None:
    """A shard with this header and valid values after it; then its tensors are decoded."""
    (folder / CONFIG).write_text(json.dumps({"quantization_config": _FORMAT_2}))
    behind = b"\x3c" * _num_bytes(data)  # 1.06 in float16, 0.01 in float32
    (folder / SINGLE).write_bytes(len(data).to_bytes(8, "little") + data + behind)
    quantized = QuantizedCheckpoint.of(Checkpoint(folder))
    for stored in quantized.decoded_names().values():
        quantized.decoded_tensor(stored, torch.float32)


def _num_bytes(header: bytes) -> int:
    """Bytes of values that a header asks for, at most _MOST_DATA; 0 if that cannot be read."""
    try:
        entries = json.loads(header).values()
        return min(_MOST_DATA, max(0, *(entry["data_offsets"][1] for entry in entries)))
    except Exception:  # of any kind: it may hold anything
        return 0


def _read_config(data: bytes, folder: Path) -> None:
    """config.json of a plain model, up to the linears that are found in it."""
    if not (folder / SINGLE).exists():
        (folder / SINGLE).write_bytes(save(_plain_tensors()))
    (folder / CONFIG).write_bytes(data)
    find_structure(Checkpoint(folder))


_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 16,
    "vocab_size": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "base_model_tp_plan": {"layers.*.self_attn.q_proj": "colwise"},
}


def _plain_tensors() -> dict[str, torch.Tensor]:
    layer, matrix = "model.layers.0", torch.zeros(64, 64, dtype=torch.bfloat16)
    attention = [f"{layer}.self_attn.{part}_proj.weight" for part in "qkvo"]
    mlp = [f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    norms = [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"]
    return {
        **{name: matrix.clone() for name in (*attention, *mlp)},
        **{f"{name}.weight": matrix[0].clone() for name in norms},
        **{f"{name}.weight": matrix[:8].clone() for name in ("lm_head", "model.embed_tokens")},
    }


def _header_seed() -> dict[str, Any]:
    shapes = layer_tensors(_ROWS, _INPUTS, _INDEX_BITS)
    tensors = {f"a.{name}": torch.zeros(shape, dtype=d) for name, (shape, d) in shapes.items()}
    content = save({**tensors, "embed.weight": torch.zeros(4, 4)})
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


TARGETS: dict[str, Target] = {
    "format": Target(_read_format, _FORMAT),
    "format-2": Target(_read_format, _FORMAT_2),
    "rate": Target(_read_rate, {"quant_method": QUANT_METHOD, "bits_per_weight": 5.5}),
    "manifest": Target(
        _read_manifest, Manifest({SINGLE: _ENTRY, "a/b.json": _ENTRY}, {CONFIG: _ENTRY}).to_dict()
    ),
    "index": Target(_read_index, {"metadata": {"a": 1}, "weight_map": {"a": f"b/{SINGLE}"}}),
    "header": Target(_read_header, _header_seed()),
    "config": Target(_read_config, _LLAMA, slow=True),
}
"""By name."""


def try_target(name: str, data: bytes, folder: Path) -> str:
    """Have a target read bytes.

    Args:
        folder: of its own: empty, or as this function left it.
    Returns:
        The message of a refusal; empty where they were accepted.
    Raises:
        Exception: of any kind: the fault.
    """
    try:
        TARGETS[name].read(data, folder)
    except QamwError as error:
        message = str(error)
        assert message, "a refusal without a message"
        return message
    except Exception as error:
        if not is_out_of_memory(error):  # which has a message of its own
            raise
        return str(error)
    return ""
