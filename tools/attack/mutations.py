"""Damage to a directory: what can happen to a checkpoint, and what somebody may have made of one.

Every function takes a directory that it may change and a source of random numbers, and returns a
line that says what it did.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tools.attack.json_values import change_somewhere, numbers_and_others
from tools.attack.reading import CONFIG, INDEX

MANIFEST = "qamw_manifest.json"

Random = random.Random
Mutation = Callable[[Path, Random], str]


def _pick(directory: Path, rng: Random, pattern: str = "*") -> Path:
    return rng.choice(sorted(path for path in directory.glob(pattern) if path.is_file()))


def _weights_or_any(directory: Path, rng: Random) -> Path:
    return _pick(directory, rng, rng.choice(["*.safetensors", "*.safetensors", "*.json", "*"]))


def flip_bits(directory: Path, rng: Random) -> str:
    """One to eight bits of a file, anywhere in it."""
    path = _weights_or_any(directory, rng)
    content, count = bytearray(path.read_bytes()), rng.choice([1, 1, 1, 8])
    places = [rng.randrange(8 * len(content)) for _ in range(count)]
    for place in places:
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return f"bits {places} of {path.name}"


def cut(directory: Path, rng: Random) -> str:
    """Another length: shorter, empty, longer, or with a part of it zero, as after a crash."""
    path, how = _weights_or_any(directory, rng), rng.choice(["short", "empty", "long", "zeros"])
    content = path.read_bytes()
    place = rng.randrange(len(content))
    if how == "short":
        content = content[:place]
    elif how == "empty":
        content = b""
    elif how == "long":
        content += rng.randbytes(rng.choice([1, 8, 4096]))
    else:
        content = content[:place] + bytes(len(content[place:]))
    path.write_bytes(content)
    return f"{path.name} {how} at {place}"


def change_header(directory: Path, rng: Random) -> str:
    """The header of a shard: how long it is, and what it says of one tensor."""
    path = _pick(directory, rng, "*.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = sorted(set(header) - {"__metadata__"})
    name, other = rng.choice(names), rng.choice(names)
    how = rng.choice(list(_HEADERS))
    text = _HEADERS[how](header, name, other, rng) or json.dumps(header)
    length = len(text.encode())
    if how == "length":
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
    path.write_bytes(length.to_bytes(8, "little") + text.encode() + data)
    return f"{how} in the header of {path.name}: {name}, {other}"


def _set(key: str, value: Callable[[Any, Random], Any]) -> Callable[..., str]:
    def change(header: dict[str, Any], name: str, _: str, rng: Random) -> str:
        header[name][key] = value(header[name][key], rng)
        return ""

    return change


def _exchange(header: dict[str, Any], name: str, other: str, _: Random) -> str:
    header[name], header[other] = header[other], header[name]
    return ""


def _rename(header: dict[str, Any], name: str, _: str, rng: Random) -> str:
    new = rng.choice([f"{name}x", name.upper(), "", "\x1b[2J", "a" * 5000, "model.x.weight"])
    header[new] = header.pop(name)
    return ""


def _twice(header: dict[str, Any], name: str, other: str, _: Random) -> str:
    return f'{json.dumps(header)[:-1]}, "{name}": {json.dumps(header[other])}}}'


def _metadata(header: dict[str, Any], _: str, __: str, rng: Random) -> str:
    header["__metadata__"] = rng.choice([{}, None, 5, {"format": 5}, {"format": "tf"}, {"a": "b"}])
    return ""


_HEADERS: dict[str, Callable[..., str]] = {
    "length": lambda header, *_: json.dumps(header),
    "dtype": _set("dtype", lambda _, rng: rng.choice(["F16", "F32", "I16", "U8", "F8_E4M3", "?"])),
    "shape": _set("shape", lambda s, rng: rng.choice([s[::-1], [*s, 1], [2**62, 4], [], [-1]])),
    "offsets": _set("data_offsets", lambda o, rng: [o[0] + rng.choice([-4, 4, 2**40]), o[1]]),
    "exchanged tensors": _exchange,
    "name": _rename,
    "lost tensor": lambda header, name, *_: header.pop(name) and "",
    "name twice": _twice,
    "metadata": _metadata,
}


def change_values(directory: Path, rng: Random) -> str:
    """One value of a tensor, or all of them, becomes an invalid one, or a plausible one."""
    path = _pick(directory, rng, "*.safetensors")
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    flat = tensors[name].clone().reshape(-1)
    at = rng.choice([slice(None), rng.randrange(len(flat))])
    value = rng.choice([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-7, 3e4, 3e38, 1.5])
    if flat.dtype.is_floating_point:
        flat[at] = value
    else:
        flat[at] = rng.randrange(-(2**31), 2**31)
    save_file({**tensors, name: flat.reshape(tensors[name].shape)}, path, {"format": "pt"})
    return f"{name}[{at}] = {value}"


def change_tensors(directory: Path, rng: Random) -> str:
    """A tensor of another dtype or shape, lost, new, or in two shards."""
    path = _pick(directory, rng, "*.safetensors")
    tensors = load_file(path)
    name, how = rng.choice(sorted(tensors)), rng.choice(list(_TENSORS))
    tensor = tensors.pop(name)
    tensors |= {n: t.contiguous() for n, t in _TENSORS[how](name, tensor).items()}
    save_file(tensors, path, {"format": "pt"})
    if how == "in two shards":
        other = _pick(directory, rng, "*.safetensors")
        save_file({**load_file(other), name: tensor.flip(0)}, other, {"format": "pt"})
    return f"{name}: {how}"


_TENSORS: dict[str, Callable[[str, torch.Tensor], dict[str, torch.Tensor]]] = {
    "lost": lambda _, t: {},
    "float64": lambda n, t: {n: t.double()},
    "float32": lambda n, t: {n: t.float()},
    "int8": lambda n, t: {n: t.to(torch.int8)},
    "one row less": lambda n, t: {n: t[:-1]},
    "transposed": lambda n, t: {n: t.transpose(0, -1)},
    "one more dimension": lambda n, t: {n: t[None]},
    "empty": lambda n, t: {n: t[:0]},
    "plain beside packed": lambda n, t: {n: t, f"{n.rpartition('.')[0]}.weight": torch.ones(4, 4)},
    "one that nobody knows": lambda n, t: {n: t, "model.extra.weight": torch.ones(4)},
    "a layer more": lambda n, t: {n: t, n.replace("layers.1.", "layers.2."): t.clone()},
    "in two shards": lambda n, t: {n: t},
}


def change_config(directory: Path, rng: Random) -> str:
    """Something in config.json, at any depth."""
    path = directory / CONFIG
    config = json.loads(path.read_text())
    part = config.get("quantization_config")
    where = part if isinstance(part, dict) and rng.random() < 0.6 else config
    line = change_somewhere(where, rng)
    path.write_text(json.dumps(config))
    return f"{CONFIG}: {line}"


def change_index(directory: Path, rng: Random) -> str:
    """The index: a tensor more or less, in another place, or no index at all."""
    path = directory / INDEX
    index = json.loads(path.read_text())
    weight_map = index["weight_map"]
    name = rng.choice(sorted(weight_map))
    how = rng.randrange(5)
    if how == 0:
        del weight_map[name]
    elif how == 1:
        weight_map[name] = rng.choice(sorted(weight_map.values()))
    elif how == 2:
        weight_map[name] = rng.choice(
            ["../x.safetensors", "/dev/zero", "absent.safetensors", CONFIG, 5, None, "", "a\0b"]
        )
    elif how == 3:
        weight_map["model.extra.weight"] = rng.choice(sorted(weight_map.values()))
    else:
        name = change_somewhere(index, rng)
    path.write_text(json.dumps(index))
    return f"{INDEX}: {name}, {how}"


def change_manifest(directory: Path, rng: Random) -> str:
    """The manifest alone, or its entry of a file that is changed too."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    entries = manifest["files"]
    name, how = rng.choice(sorted(entries)), rng.randrange(5)
    if how == 0:
        del entries[name]
        (directory / name).write_bytes(b"changed")
    elif how == 1:
        entries[rng.choice(["../x", "/etc/passwd", "", "absent", "a\0b", "x" * 300])] = entries[
            name
        ]
    elif how == 2:
        entries[name][rng.choice(["bytes", "sha256", "more"])] = numbers_and_others(rng)
    elif how == 3:
        name = change_somewhere(manifest, rng)
    else:
        path.write_text(path.read_text()[: rng.randrange(200)])
        return f"{MANIFEST} cut"
    path.write_text(json.dumps(manifest))
    return f"{MANIFEST}: {name}, {how}"


def misplace(directory: Path, rng: Random) -> str:
    """Something else in the place of a file, or where no file should be."""
    path, how = _weights_or_any(directory, rng), rng.choice(list(_PLACES))
    moved = path.with_name(f"{path.name}.moved")
    other = _pick(directory, rng, "*.safetensors")
    path.rename(moved)
    _PLACES[how](path, moved, other if other != path else moved)
    if how not in ("renamed", "a link to it"):
        moved.unlink(missing_ok=True)
    return f"{path.name}: {how}"


def _extra(name: str) -> Callable[[Path, Path, Path], object]:
    def make(path: Path, moved: Path, other: Path) -> None:
        moved.rename(path)
        (path.parent / name).write_bytes(path.read_bytes())

    return make


def _sparse(path: Path, _: Path, __: Path) -> None:
    path.touch()
    os.truncate(path, 2**34)


_PLACES: dict[str, Callable[[Path, Path, Path], object]] = {
    "gone": lambda path, moved, other: None,
    "renamed": lambda path, moved, other: None,
    "a FIFO": lambda path, moved, other: os.mkfifo(path),
    "a folder": lambda path, moved, other: path.mkdir(),
    "a dangling link": lambda path, moved, other: path.symlink_to("nowhere"),
    "a link to itself": lambda path, moved, other: path.symlink_to(path),
    "a link to it": lambda path, moved, other: path.symlink_to(moved.name),
    "/dev/zero": lambda path, moved, other: path.symlink_to("/dev/zero"),
    "16 GiB of zeros": _sparse,
    "another shard": lambda path, moved, other: path.write_bytes(other.read_bytes()),
    "an extra shard": _extra("extra.safetensors"),
    "an extra pickle": _extra("pytorch_model.bin"),
    "a hidden shard": _extra(".hidden.safetensors"),
}

QUANTIZED: dict[str, Mutation] = {
    "bits": flip_bits,
    "truncations": cut,
    "headers": change_header,
    "configs": change_config,
    "values": change_values,
    "tensors": change_tensors,
    "index": change_index,
    "manifests": change_manifest,
    "places": misplace,
}
"""Kind -> damage to a quantized checkpoint."""

_OF_PLAIN = ("bits", "truncations", "headers", "configs", "values", "tensors", "index", "places")
SOURCES: dict[str, Mutation] = {f"source {kind}": QUANTIZED[kind] for kind in _OF_PLAIN}
"""Kind -> damage to a plain checkpoint."""
