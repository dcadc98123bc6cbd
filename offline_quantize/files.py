"""Names of the files of a checkpoint and of a run; checks of their directory and its disk."""

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

from offline_quantize.errors import Option, QuantizeError
from qamw_kernels.format.index import CONFIG as CONFIG  # re-exported

SINGLE = "model.safetensors"
REPORT = "qamw_report.json"
PLOT = "qamw_report.png"
CARD = "README.md"
BASE_CARD = "README.base-model.md"  # the model's own card: CARD is ours
PROGRESS = ".qamw-progress.json"
STATE = ".qamw-state"  # measurements, so that a resumed run need not repeat them
LOCK = ".qamw-lock"  # held by the run that writes a directory
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


def can_be_listed(name: str) -> bool:
    """Whether a manifest can have a file of this name, and all operating systems a file of it."""
    is_utf8 = not any("\ud800" <= c <= "\udfff" for c in name)
    return is_utf8 and not any(c == "\\" or unicodedata.category(c) == "Cc" for c in name)


def json_bytes(value: Any) -> bytes:
    """JSON as this package writes it: indented, UTF-8, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def check_finished(directory: Path, known: str = "") -> None:
    """Refuse what an interrupted run left.

    Args:
        known: what the message says of the directory before that.
    Raises:
        QuantizeError: the directory holds an unfinished run.
    """
    if (directory / PROGRESS).is_file():
        raise QuantizeError(
            f"{directory}: {known}unfinished: continue qamw quantize with ",
            Option("resume", True),
            ", or start qamw dequantize again in a new directory",
        )


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def free_bytes(path: Path) -> int:
    """What is free on the disk that holds, or will hold, ``path``."""
    return shutil.disk_usage(existing_parent(path)).free


def check_space(path: Path, needed: int, free: int | None = None) -> None:
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
