"""The output directory: every file is written under a temporary name, synced and renamed, config.json last.

A progress file remembers finished shards and a fingerprint of the request, so that ``--resume`` goes on only with the very
same request and ends in the very same bytes. Without config.json nothing can mistake a partial directory for a checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from offline_quantize.model.checkpoint import INDEX, read_json
from offline_quantize.errors import QuantizeError

PROGRESS = ".qamw-progress.json"
STATE = ".qamw-state"  # what a run that is resumed would else have to measure again
MANIFEST = "qamw_manifest.json"
CONFIG = "config.json"
_TEMPORARY = ".partial"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_blank(directory: Path) -> bool:
    """An empty directory, or one whose run was killed before anything was promised."""
    return directory.is_dir() and all(path.name == PROGRESS + _TEMPORARY for path in directory.iterdir())


def another_request(directory: Path) -> QuantizeError:
    """The error for an unfinished run that is to be resumed by a request that is not its own."""
    return QuantizeError(f"{directory}: started from another request (model, options, calibration text or versions differ); "
                         "resume with the same ones, or start again in a new directory")


class Output:
    """One output directory being written.

    Attributes:
        files: file name -> {"sha256", "bytes"} of everything finished so far.
        notes: what each finished shard put into the report, by file name.
    """

    def __init__(self, directory: Path, fingerprint: str, resume: bool) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.files: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        if resume:
            self._load_progress()
        directory.mkdir(parents=True, exist_ok=resume or _is_blank(directory))
        for leftover in directory.rglob(f"*{_TEMPORARY}"):
            leftover.unlink()
        self._save_progress()

    @staticmethod
    def check_target(directory: Path, source: Path, resume: bool) -> None:
        """Refuse a directory that is there already, unless it is to be resumed and is unfinished; or lies in the one that is read."""
        if source.resolve() in (directory.resolve(), *directory.resolve().parents):
            raise QuantizeError(f"{directory}: the output must not be the model's own directory, nor inside it")
        if not resume:
            if directory.exists() and not _is_blank(directory):
                hint = ", a new or empty directory was expected"
                if (directory / PROGRESS).is_file():
                    hint = "; it is unfinished: qamw quantize continues with --resume, qamw dequantize only in a new directory"
                raise QuantizeError(f"{directory}: already exists{hint}")
        elif not (directory / PROGRESS).is_file():
            state = "is finished" if (directory / CONFIG).is_file() else "holds no unfinished run" if directory.is_dir() else "is not there"
            raise QuantizeError(f"{directory}: nothing to resume, the directory {state}")

    def _load_progress(self) -> None:
        progress = read_json(self.directory / PROGRESS)
        if progress.get("fingerprint") != self.fingerprint:
            raise another_request(self.directory)
        for file, entry in progress["files"].items():
            path = self.directory / file
            if path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]:
                self.files[file] = entry
                self.notes[file] = progress["notes"].get(file)

    def _save_progress(self) -> None:
        self._commit(PROGRESS, lambda path: path.write_bytes(
            json_bytes({"fingerprint": self.fingerprint, "files": self.files, "notes": self.notes})))

    def _commit(self, file: str, write: Callable[[Path], Any]) -> Path:
        path = self.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + _TEMPORARY)
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
        return path

    def write(self, file: str, write: Callable[[Path], Any]) -> None:
        """Write one file through ``write(temporary path)``."""
        path = self._commit(file, write)
        self.files[file] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}

    def write_shard(self, file: str, tensors: dict[str, torch.Tensor], note: Any) -> None:
        """Write one safetensors shard and remember it (and its ``note`` for the report) as finished."""
        self.write(file, lambda path: self._save(tensors, path))
        self.notes[file] = note
        self._save_progress()

    @staticmethod
    def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk too, which is no OSError here
            raise QuantizeError(f"{path}: {error}") from None

    def keep_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep tensors beside the progress until the run is finished."""
        self._commit(STATE, lambda path: self._save(tensors, path))

    @staticmethod
    def kept_state(directory: Path) -> dict[str, torch.Tensor]:
        """What :meth:`keep_state` kept of an unfinished run; nothing, if it was not reached."""
        return load_file(directory / STATE) if (directory / STATE).is_file() else {}

    def read_shard(self, file: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Some tensors of a finished shard."""
        with safe_open(self.directory / file, "pt") as shard:
            return {name: shard.get_tensor(name) for name in names}

    def finish(self, weight_map: dict[str, str], total_size: int, config: dict[str, Any]) -> None:
        """Write the index, the manifest and, last of all, config.json; then the run is no longer resumable."""
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        self.write(INDEX, lambda path: path.write_bytes(json_bytes(index)))
        content = json_bytes(config)
        self.files[CONFIG] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest = {"manifest_version": 1, "files": dict(sorted(self.files.items()))}
        self._commit(MANIFEST, lambda path: path.write_bytes(json_bytes(manifest)))
        self._commit(CONFIG, lambda path: path.write_bytes(content))
        (self.directory / STATE).unlink(missing_ok=True)
        (self.directory / PROGRESS).unlink()
        _sync(self.directory)
