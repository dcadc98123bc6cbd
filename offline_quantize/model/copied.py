"""The files of a model that are copied: tokenizer, chat template, license, and the like.

Of files with weights, only those of the modules that sentence-transformers puts behind a model are
copied. Files that cannot be copied, or cannot be listed in a manifest, are refused before any work
is done.
"""

import json
import os
import re
from pathlib import Path

from offline_quantize.errors import QuantizeError
from offline_quantize.files import CONFIG, WEIGHT_SUFFIXES, can_be_listed
from qamw_kernels.errors import FileError
from qamw_kernels.files import open_regular

MAX_DEPTH = 16  # of folders inside each other
# Configs of weights that are not in the result: an adapter's, and those that ModelOpt quantized.
# vLLM would apply the latter to the plain checkpoint that ``qamw dequantize`` writes.
WEIGHT_CONFIGS = ("adapter_config.json", "hf_quant_config.json")

_MODULES = "modules.json"
_TRAINING_STATE = re.compile(r"checkpoint-\d+")  # a folder that a trainer leaves


def copied_files(directory: Path) -> list[str]:
    """Paths inside a model's directory of every file that is copied, in order.

    Hidden ones are left out, and so are adapters and what a trainer left.

    Raises:
        QuantizeError: a name cannot be written into a manifest; a file is a link out of the
            directory, or a folder is a link; or folders are nested too deeply.
    """
    found, folders, modules = [], [directory], module_folders(directory)
    while folders:
        folder = folders.pop()
        if len(folder.relative_to(directory).parts) > MAX_DEPTH:
            raise QuantizeError(f"{folder}: more than {MAX_DEPTH} folders inside each other")
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if path.is_symlink():
                    raise QuantizeError(
                        f"{path}: a link to a folder; replace it with a copy or remove it"
                    )
                if not _TRAINING_STATE.fullmatch(path.name):
                    folders.append(path)
                continue
            relative = path.relative_to(directory).as_posix()
            left_out = _is_weights(path.name) and os.path.dirname(relative) not in modules
            if not (left_out or relative == CONFIG):
                _check_name(path, relative)
                _check_link(path, directory)
                found.append(relative)
    return sorted(found)


def module_folders(directory: Path) -> frozenset[str]:
    """Folders, inside a model's directory, of the modules behind it: pooling, dense layers.

    sentence-transformers and vLLM read their weights beside those of the model.
    """
    try:
        with open_regular(directory / _MODULES) as file:
            modules = json.load(file)
    except (FileError, ValueError, RecursionError):  # there is none, or it is something else
        return frozenset()
    entries = modules if isinstance(modules, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return frozenset(path for path in paths if isinstance(path, str) and path)


def _is_weights(file: str) -> bool:
    """Whether a file has weights, is their config, or is an index, in any format."""
    is_index = any(file.endswith(f"{suffix}.index.json") for suffix in WEIGHT_SUFFIXES)
    return is_index or file.endswith(WEIGHT_SUFFIXES) or file in WEIGHT_CONFIGS


def _check_name(path: Path, relative: str) -> None:
    """Refuse what no manifest can list."""
    if not can_be_listed(relative):
        raise QuantizeError(
            f"{path}: its name is not UTF-8, or has a backslash or a control character; "
            "rename or remove it"
        )


def _check_link(path: Path, directory: Path) -> None:
    """Refuse links out of the directory, except to the hub cache's blobs.

    The copies may be published, so they must hold nothing but the model's own files.
    """
    if not path.is_symlink():
        return
    try:
        target, own = path.resolve(), directory.resolve()
    except (OSError, RuntimeError):  # which of them depends on the version of Python
        raise QuantizeError(f"{path}: a link that leads to itself; remove it") from None
    inside = target.is_relative_to(own) or target.is_relative_to(own.parent.parent / "blobs")
    if not (os.path.isfile(target) and inside):
        raise QuantizeError(
            f"{path}: a link to {target}, which is not a file of the model; "
            "replace it with a copy or remove it"
        )
