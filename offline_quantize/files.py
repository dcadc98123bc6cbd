"""Files: their names, and writing them whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offline_quantize.errors import QuantizeError

CONFIG = "config.json"
SINGLE = "model.safetensors"
REPORT = "qamw_report.json"
PLOT = "qamw_report.png"
CARD = "README.md"
BASE_CARD = "README.base-model.md"  # the model card is ours; the model's own stays beside it
PROGRESS = ".qamw-progress.json"
STATE = ".qamw-state"  # what a run that is resumed would otherwise have to measure again
LOCK = ".qamw-lock"  # held by the run that writes a directory
TEMPORARY = ".partial"  # suffix of a file that is being written
# Weights in other formats, and indices of any: what a quantized checkpoint must not carry along.
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".tflite",
    ".npz",
    ".pkl",
    ".nemo",
    ".distcp",
    ".ot",
    ".llamafile",
)


def json_bytes(value: Any) -> bytes:
    """JSON as this package writes it: indented, UTF-8, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all: under a temporary name, synced, renamed.

    Args:
        path: of the file; its folder must exist.
        write: is called with the temporary path, which no other process has.
    """
    # Not made of the file's own name, which may be as long as names can be.
    temporary = path.with_name(f".qamw-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except (Exception, KeyboardInterrupt):
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def leftovers(directory: Path) -> list[Path]:
    """Temporary files below a directory, of processes that were killed while they wrote."""
    return list(directory.rglob(f".qamw-*{TEMPORARY}"))


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which files a directory has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def free_bytes(path: Path) -> int:
    """What is free on the disk that holds, or will hold, ``path``."""
    return shutil.disk_usage(existing_parent(path)).free


def check_disk(path: Path, needed: int, free: int | None = None) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        path: what will be written, or the directory for it.
        needed: bytes. free: bytes, None for :func:`free_bytes`.
    Raises:
        QuantizeError: less is free than needed.
    """
    free = free_bytes(path) if free is None else free
    if free < needed:
        raise QuantizeError(
            f"{path}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on its disk"
        )
