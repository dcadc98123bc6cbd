"""The output directory: every file is written whole or not at all, config.json last.

A progress file remembers finished shards and a fingerprint of the request, so that a resumed run
goes on only with the very same request and ends in the very same bytes. Without config.json nothing
can mistake a partial directory for a checkpoint.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from offline_quantize.errors import Option, QuantizeError
from offline_quantize.files import (
    CONFIG,
    INDEX,
    PROGRESS,
    STATE,
    TEMPORARY,
    json_bytes,
    sync,
    write_atomically,
)
from qamw_kernels.files import read_json, sha256_of
from qamw_kernels.format.manifest import MANIFEST


def another_request(directory: Path) -> QuantizeError:
    """The error for an unfinished run that another request than its own is to resume."""
    return QuantizeError(
        f"{directory}: started from another request (model, options, calibration text or versions "
        "differ); resume with the same ones, or start again in a new directory"
    )


class Output:
    """One output directory being written.

    Attributes:
        directory: where.
        fingerprint: identifies the request.
        files: file name -> {"sha256", "bytes"} of everything finished so far.
        notes: JSON that was stored with each finished shard, by file name.
    """

    def __init__(self, directory: Path, fingerprint: str, resume: bool) -> None:
        """Create the directory, or take up what is finished in it.

        Raises:
            QuantizeError: another request is to be resumed.
        """
        self.directory = directory
        self.fingerprint = fingerprint
        self.files: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        if resume:
            self._load_progress()
        directory.mkdir(parents=True, exist_ok=resume or _is_blank(directory))
        for leftover in directory.rglob(f"*{TEMPORARY}"):
            leftover.unlink()
        self._save_progress()

    @staticmethod
    def check_target(directory: Path, source: Path, resume: bool) -> None:
        """Refuse a directory that cannot be written to as asked.

        Args:
            source: the directory that is read.
        Raises:
            QuantizeError: the directory is ``source`` or inside it; it has content but is not to be
                resumed; or it is to be resumed and holds no unfinished run.
        """
        if source.resolve() in (directory.resolve(), *directory.resolve().parents):
            raise QuantizeError(
                f"{directory}: the output must not be the model's own directory, nor inside it"
            )
        if resume:
            _check_resumable(directory)
        else:
            _check_new(directory)

    @staticmethod
    def kept_state(directory: Path) -> dict[str, torch.Tensor]:
        """What :meth:`keep_state` kept of an unfinished run; nothing, if it was not reached."""
        return load_file(directory / STATE) if (directory / STATE).is_file() else {}

    def keep_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep tensors beside the progress until the run is finished."""
        self._commit(STATE, lambda path: _save_tensors(tensors, path))

    def write(self, file: str, write: Callable[[Path], Any]) -> None:
        """Write one file.

        Args:
            file: path inside the directory.
            write: is called with a temporary path.
        """
        path = self._commit(file, write)
        self.files[file] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}

    def write_bytes(self, file: str, content: bytes) -> None:
        """Write one file with this content."""
        self.write(file, lambda path: path.write_bytes(content))

    def write_shard(self, file: str, tensors: dict[str, torch.Tensor], note: Any) -> None:
        """Write one safetensors shard and remember it as finished.

        Args:
            note: JSON to keep with it.
        Raises:
            QuantizeError: it cannot be written, on a full disk for example; names the file.
        """
        self.write(file, lambda path: _save_tensors(tensors, path))
        self.notes[file] = note
        self._save_progress()

    def read_shard(self, file: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Some tensors of a finished shard."""
        with safe_open(self.directory / file, "pt") as shard:
            return {name: shard.get_tensor(name) for name in names}

    def finish(self, weight_map: dict[str, str], total_size: int, config: dict[str, Any]) -> None:
        """Write index, manifest and, last of all, config.json; the run is no longer resumable.

        Args:
            weight_map: tensor name -> shard.
            total_size: bytes of all tensors.
            config: the content of config.json.
        """
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        self.write_bytes(INDEX, json_bytes(index))
        content = json_bytes(config)
        # The manifest comes before config.json, but lists it.
        digest = hashlib.sha256(content).hexdigest()
        self.files[CONFIG] = {"sha256": digest, "bytes": len(content)}
        manifest = {"manifest_version": 1, "files": dict(sorted(self.files.items()))}
        self._commit(MANIFEST, lambda path: path.write_bytes(json_bytes(manifest)))
        self._commit(CONFIG, lambda path: path.write_bytes(content))
        (self.directory / STATE).unlink(missing_ok=True)
        (self.directory / PROGRESS).unlink()
        sync(self.directory)

    def _load_progress(self) -> None:
        """Take up the finished files whose bytes are still what they were."""
        progress = read_json(self.directory / PROGRESS)
        if progress.get("fingerprint") != self.fingerprint:
            raise another_request(self.directory)
        for file, entry in progress["files"].items():
            path = self.directory / file
            same_size = path.is_file() and path.stat().st_size == entry["bytes"]
            if same_size and sha256_of(path) == entry["sha256"]:
                self.files[file] = entry
                self.notes[file] = progress["notes"].get(file)

    def _save_progress(self) -> None:
        progress = {"fingerprint": self.fingerprint, "files": self.files, "notes": self.notes}
        self._commit(PROGRESS, lambda path: path.write_bytes(json_bytes(progress)))

    def _commit(self, file: str, write: Callable[[Path], Any]) -> Path:
        path = self.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)

        def write_readable(temporary: Path) -> None:
            write(temporary)
            temporary.chmod(0o644)  # safetensors writes files that only their owner can read

        write_atomically(path, write_readable)
        return path


def _is_blank(directory: Path) -> bool:
    """Whether it is empty, or holds only what a run left that died before its first progress."""
    if not directory.is_dir():
        return False
    return all(path.name == PROGRESS + TEMPORARY for path in directory.iterdir())


def _check_new(directory: Path) -> None:
    if not directory.exists() or _is_blank(directory):
        return
    if (directory / PROGRESS).is_file():
        raise QuantizeError(
            f"{directory}: already exists; it is unfinished: qamw quantize continues with ",
            Option("resume", True),
            ", qamw dequantize only in a new directory",
        )
    raise QuantizeError(f"{directory}: already exists, a new or empty directory was expected")


def _check_resumable(directory: Path) -> None:
    if (directory / PROGRESS).is_file():
        return
    if (directory / CONFIG).is_file():
        state = "is finished"
    elif directory.is_dir():
        state = "holds no unfinished run"
    else:
        state = "is not there"
    raise QuantizeError(f"{directory}: nothing to resume, the directory {state}")


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # of a full disk too, which is no OSError here
        raise QuantizeError(f"{path}: {error}") from None
