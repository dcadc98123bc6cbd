"""A Hugging Face checkpoint directory, read header by header and tensor by tensor.

Only safetensors is read, never pickle.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.files import CARD, CONFIG, SINGLE, WEIGHT_SUFFIXES, check_finished
from offline_quantize.model.copied import copied_files
from offline_quantize.model.encoded import find_encoding
from offline_quantize.model.encoded_tensor import Encoded
from offline_quantize.model.sources import Sources
from qamw_kernels.errors import FileError
from qamw_kernels.files import open_regular, parse_json, read_json
from qamw_kernels.format.index import INDEX, read_index
from qamw_kernels.format.weight import check_plain

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

_CARD_BYTES = 2**16  # read of a model card: its metadata comes first
_MAPPED_BYTES = 2**28  # of a shard at most, plus the last tensor read


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header describes of one tensor."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Checkpoint:
    """A directory with config.json and safetensors shards.

    Weights that a method other than QAM-W quantized are decoded as they are read (:mod:`.encoded`).

    Attributes:
        directory: the path given.
        name: the directory's name, or the id of a model in the hub's cache.
        config: config.json.
        quantization: ``quantization_config`` of it; empty for a plain checkpoint.
        tensors: name -> TensorInfo, as they are once decoded.
        encoding: how they are encoded, in words; empty if they are not, or cannot be decoded.
        source_bytes: of the tensors in the shards.
        sources: the files that were read; what is read from them later must be unchanged.
    """

    def __init__(self, directory: Path) -> None:
        """Read config.json, the index and the header of every shard.

        Raises:
            FileError, FormatError: config.json or the index cannot be understood.
            QuantizeError: the run that writes it is unfinished; a shard is missing or cannot be
                read; or shards contradict each other or config.json.
        """
        check_finished(directory)
        self.directory = directory
        self.name = _model_name(directory)
        self.sources = Sources(directory)
        self.sources.note(CONFIG)
        self.config = _read_config(directory / CONFIG)
        self.quantization = _quantization(self.config)
        self.tensors: dict[str, TensorInfo] = {}
        weight_map = self._weight_map()
        for file in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
            self._read_header(file)
        for name, file in (weight_map or {}).items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise QuantizeError(f"{directory / INDEX}: {name} should be in {file}, but is not")
        self.source_bytes = sum(info.num_bytes for info in self.tensors.values())
        self.encoding = ""
        self._stored = self.tensors
        self._encoded: dict[str, Encoded] = {}
        self._decode()

    def _decode(self) -> None:
        """From now on, ``tensors`` are those that a plain checkpoint would have."""
        try:
            encoding = find_encoding(self.quantization, _dtype(self.config), self._stored)
        except QuantizeError as error:
            raise QuantizeError(f"{self.directory}: ", *error.parts) from None
        if encoding is None:
            return
        self.encoding = encoding.description
        self._encoded = {tensor.name: tensor for tensor in encoding.tensors}
        decoded = {}
        for name, tensor in self._encoded.items():
            file = self._stored[next(iter(tensor.parts.values()))].file
            decoded[name] = TensorInfo(name, file, tensor.shape, tensor.dtype)
        plain = {n: info for n, info in self._stored.items() if n not in encoding.dropped}
        self.tensors = plain | decoded

    def _weight_map(self) -> dict[str, str] | None:
        """The index: name of a tensor -> its file. None where one file holds all."""
        if (self.directory / INDEX).exists():
            self.sources.note(INDEX)
            weight_map = read_index(self.directory)
            if (self.directory / SINGLE).exists() and SINGLE not in weight_map.values():
                raise QuantizeError(
                    f"{self.directory}: {INDEX} names other files than {SINGLE}, which is there "
                    "too; vLLM would read those, and transformers this: remove what does not belong"
                )
            return weight_map
        if not (self.directory / SINGLE).exists():
            raise QuantizeError(self._no_weights())
        return None

    def _no_weights(self) -> str:
        message = f"{self.directory}: neither {INDEX} nor {SINGLE} found"
        others = sorted(p.name for p in self.directory.glob("*") if p.suffix in WEIGHT_SUFFIXES)
        shards = [name for name in others if name.endswith(".safetensors")]
        if shards:
            return f"{message}; found {shards}, which can only be read with the index"
        if others:
            hint = "which are not read: convert them to safetensors first"
            return f"{message}; found {others}, {hint}"
        return message

    def _read_header(self, file: str) -> None:
        path = self.directory / file
        self.sources.note(file)
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    entry = shard.get_slice(name)
                    dtype = entry.get_dtype()
                    if dtype not in _DTYPES:
                        raise QuantizeError(f"{path}: {name}: unsupported dtype {dtype}")
                    if name in self.tensors:
                        raise QuantizeError(f"{path}: {name} is also in {self.tensors[name].file}")
                    shape = tuple(entry.get_shape())
                    self.tensors[name] = TensorInfo(name, file, shape, _DTYPES[dtype])
        except (SafetensorError, OSError) as error:
            raise QuantizeError(f"{path}: not a readable safetensors file: {error}") from None
        _check_names(path)

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in the given order, on the CPU.

        A shard is mapped only while its tensors are read.

        Raises:
            QuantizeError: a shard is no longer what it was when the checkpoint was opened, or a
                tensor cannot be decoded.
        """
        reader = _Reader(self.directory, self.sources)
        for name in names:
            encoded = self._encoded.get(name)
            if encoded is None:
                yield name, reader.read(self._stored[name])
                continue
            parts = {part: reader.read(self._stored[x]) for part, x in encoded.parts.items()}
            with explained(f"{self.directory / self.tensors[name].file}: {name}: {self.encoding}"):
                tensor = encoded.values(parts)
            yield name, tensor

    def decodes(self, name: str) -> bool:
        """Whether the shards do not have the tensor itself, but what it is decoded from."""
        return name in self._encoded

    def load_finite(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """As :meth:`load`, and check every value.

        Raises:
            TensorError: see :func:`check_plain`.
        """
        for name, tensor in self.load(names):
            check_plain(tensor, name)
            yield name, tensor

    def base_model(self) -> str:
        """The base model that the model card names, as the end of a sentence."""
        try:
            with open_regular(self.directory / CARD) as file:
                text = file.read(_CARD_BYTES).decode(errors="replace")
        except FileError:
            return ""
        named = re.search(r"^base_model:\s*(?:-\s*)?(\S+)$", text, re.MULTILINE)
        return f", {named[1]}" if named else ""

    def other_files(self) -> list[str]:
        """Paths inside the directory of every file without weights; see :mod:`.copied`.

        Raises:
            QuantizeError: one cannot be copied.
            FileError: one is no regular file.
        """
        files = copied_files(self.directory)
        for file in files:
            self.sources.note(file)
        return files


class _Reader:
    """Reads tensors, and keeps the shard of the last one mapped.

    The parts of a mapping that were read count as memory of this process, so none is kept for long.
    """

    def __init__(self, directory: Path, sources: Sources) -> None:
        self._directory, self._sources = directory, sources
        self._file = ""
        self._shard: Any = None
        self._bytes_read = 0  # of the mapping

    def read(self, info: TensorInfo) -> torch.Tensor:
        if info.file != self._file:
            self._sources.check(info.file)
            self._file, self._shard = info.file, safe_open(self._directory / info.file, "pt")
            self._bytes_read = 0
        tensor: torch.Tensor = self._shard.get_tensor(info.name).clone()  # the mapping can go
        self._sources.check_read(info.file)
        self._bytes_read += tensor.nbytes
        if self._bytes_read > _MAPPED_BYTES:
            self._file, self._shard = "", None
        return tensor


def _check_names(path: Path) -> None:
    """Refuse a shard whose header has a name twice: safetensors silently takes the last.

    Raises:
        FileError: names the shard and the tensor.
    """
    with open_regular(path) as file:  # safe_open has found the header's length to be sound
        parse_json(file.read(int.from_bytes(file.read(8), "little")), path)


def _model_name(directory: Path) -> str:
    """The name of a directory, or of the model in ``models--ORG--NAME/snapshots/REVISION``."""
    directory = directory.resolve()
    repository = directory.parent.parent.name
    if repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return directory.name


def _read_config(path: Path) -> dict[str, Any]:
    """config.json; the types of values that other code reads unchecked are checked here."""
    config = read_json(path)
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("quantization_config", "text_config", "base_model_tp_plan"):
            value = section.get(key)
            if not isinstance(value, dict | None):
                raise QuantizeError(
                    f"{path}: {key} must be a JSON object, got {type(value).__name__}"
                )
        for name, style in (section.get("base_model_tp_plan") or {}).items():
            if not isinstance(style, str):
                raise QuantizeError(
                    f"{path}: base_model_tp_plan must map names to strings, "
                    f"got {type(style).__name__} for {name}"
                )
    return config


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """How a checkpoint is quantized; multimodal models may have that in ``text_config``."""
    text_config = config.get("text_config") or {}
    found: dict[str, Any] = (
        config.get("quantization_config") or text_config.get("quantization_config") or {}
    )
    return found


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of config.json that does not say how a checkpoint is quantized."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = without_quantization(plain["text_config"])
    return plain


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """The model's dtype in 16 bits: bfloat16 where config.json does not say float16."""
    for section in (config, config.get("text_config") or {}):
        if "float16" in (section.get("dtype"), section.get("torch_dtype")):
            return torch.float16
    return torch.bfloat16


def resolve_model(model: str) -> Path:
    """The directory of a model: a local one as it is, a hub id downloaded.

    Only safetensors and small files are downloaded.

    Raises:
        QuantizeError: neither a directory nor a hub id that can be downloaded.
    """
    path = Path(model)
    if model and path.is_dir():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise QuantizeError(f"{model!r}: not a directory, nor a hub id of the form ORG/NAME")
    from huggingface_hub import snapshot_download  # slow to import

    others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"]
    others.append("checkpoint-*/*")
    try:
        return Path(snapshot_download(model, ignore_patterns=others))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        raise QuantizeError(f"{model}: not a directory, and the hub answered: {error}") from None
