"""A Hugging Face checkpoint directory, read header by header and tensor by tensor. Only safetensors, never pickle."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from offline_quantize.errors import QuantizeError
from qamw_kernels.codec.encode import check_finite

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Weights in other formats, and indices of any: what a quantised checkpoint must not carry along.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data",
                   ".tflite", ".npz", ".pkl", ".nemo")

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
           "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about one tensor."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object, with the file's name in every error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuantizeError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizeError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise QuantizeError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class Checkpoint:
    """A directory with config.json and safetensors shards.

    Attributes:
        directory: the path given. name: the directory's own, or the id of a model in the hub's cache.
        config: config.json.
        tensors: name -> TensorInfo, of all shards.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        folder = directory.resolve()
        repository = folder.parent.parent.name  # models--ORG--NAME/snapshots/REVISION in the hub's cache
        self.name = repository.removeprefix("models--").replace("--", "/") if repository.startswith("models--") else folder.name
        self.config = read_json(directory / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._shards():
            try:
                with safe_open(directory / file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (not a dict)
                        entry = shard.get_slice(name)
                        if entry.get_dtype() not in _DTYPES:
                            raise QuantizeError(f"{directory / file}: {name}: unsupported dtype {entry.get_dtype()}")
                        if name in self.tensors:
                            raise QuantizeError(f"{directory / file}: {name} is also in {self.tensors[name].file}")
                        self.tensors[name] = TensorInfo(name, file, tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])
            except (SafetensorError, OSError) as error:
                raise QuantizeError(f"{directory / file}: not a readable safetensors file: {error}") from None
        self._check_against_index()

    def _shards(self) -> list[str]:
        if (self.directory / INDEX).is_file():
            self.weight_map = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(self.weight_map, dict) or not self.weight_map:
                raise QuantizeError(f"{self.directory / INDEX}: weight_map must be a JSON object that is not empty")
            files = sorted({str(file) for file in self.weight_map.values()})
            for file in files:
                path = PurePosixPath(file)
                if path.is_absolute() or ".." in path.parts or "\\" in file or path.suffix != ".safetensors":
                    raise QuantizeError(f"{self.directory / INDEX}: weight_map names {file!r}, "
                                        "expected a .safetensors file inside the directory")
            return files
        if (self.directory / SINGLE).is_file():
            self.weight_map = None
            return [SINGLE]
        others = sorted(p.name for p in self.directory.glob("*") if p.suffix in WEIGHT_SUFFIXES)
        shards = [name for name in others if name.endswith(".safetensors")]
        hint = "which are read with the index only" if shards else "which are not read: convert them to safetensors first"
        raise QuantizeError(f"{self.directory}: neither {INDEX} nor {SINGLE} found"
                            + (f"; found {shards or others}, {hint}" if others else ""))

    def _check_against_index(self) -> None:
        for name, file in (self.weight_map or {}).items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise QuantizeError(f"{self.directory / INDEX}: {name} should be in {file}, but is not")

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in the given order; a shard is mapped only while its tensors are being read."""
        open_file = ""
        shard: Any = None
        for name in names:
            info = self.tensors[name]
            if info.file != open_file:
                open_file, shard = info.file, safe_open(self.directory / info.file, framework="pt")
            yield name, shard.get_tensor(name).clone()  # a copy, so that the mapping can go

    def load_finite(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """As :meth:`load`.

        Raises:
            ValueError: a tensor is not finite; it names the first such value.
        """
        for name, tensor in self.load(names):
            if tensor.dtype.itemsize > 1:  # 8 bits know no infinity
                check_finite(tensor, name)
            yield name, tensor

    def other_files(self) -> list[str]:
        """Relative paths of every file that holds no weights: tokenizer, chat template, generation config, licence."""
        found = []
        for root, folders, files in os.walk(self.directory):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for file in sorted(files):
                relative = (Path(root) / file).relative_to(self.directory).as_posix()
                is_index = any(file.endswith(suffix + ".index.json") for suffix in WEIGHT_SUFFIXES)
                if not (file.startswith(".") or file.endswith(WEIGHT_SUFFIXES) or is_index or relative == "config.json"):
                    self._check_link(Path(root) / file)
                    found.append(relative)
        return found

    def _check_link(self, path: Path) -> None:
        """Files are copied into something that will be published: links must not lead out, but to the hub cache's blobs."""
        target, own = path.resolve(), self.directory.resolve()
        if not target.is_file() or not (target.is_relative_to(own) or target.is_relative_to(own.parent.parent / "blobs")):
            raise QuantizeError(f"{path}: a link to {target}, which is not a file of the model; replace it by a copy or remove it")


def resolve_model(model: str) -> Path:
    """A local directory as it is; otherwise a hub id, downloaded (safetensors and small files only).

    Raises:
        QuantizeError: neither a directory nor a reachable hub id.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise QuantizeError(f"{model}: not a directory, nor a hub id of the form ORG/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=[f"*{s}" for s in WEIGHT_SUFFIXES if s != ".safetensors"]))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        raise QuantizeError(f"{model}: not a directory, and the hub answered: {error}") from None
