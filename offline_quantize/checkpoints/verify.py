"""Whether every byte and every tensor of a QAM-W checkpoint is as it should be.

Every check returns a list of faults, each one line that names the file and the tensor. Later checks
build on earlier ones: files as the manifest lists them, then tensors as the format describes them,
then input scales that layers share.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offline_quantize.checkpoints.quantized import (
    QuantizedCheckpoint,
    check_finished,
    open_quantized,
)
from offline_quantize.errors import QuantizeError
from offline_quantize.model.checkpoint import TensorInfo
from offline_quantize.model.structure import InputGroup, find_structure
from qamw_kernels.errors import QamwError
from qamw_kernels.files import read_json, sha256_of
from qamw_kernels.format.config import LAYER_TENSORS
from qamw_kernels.format.manifest import MANIFEST
from qamw_kernels.format.weight import check_input_scales, check_row_norms


def verify(directory: Path) -> str:
    """Check every file against the manifest and every tensor against the format.

    Returns:
        A line that describes what was checked.
    Raises:
        QuantizeError: with every fault found, one per line.
    """
    manifest = _read_manifest(directory)
    _refuse(_listed_file_faults(directory, manifest) + _unlisted_file_faults(directory, manifest))

    quantized = open_quantized(directory)
    faults = []
    for module in quantized.modules:
        faults += _layer_faults(quantized, module)
    for info in quantized.checkpoint.tensors.values():
        for check in TENSOR_CHECKS:
            faults += check(quantized, info)
    _refuse(faults)
    for layer in find_structure(quantized.checkpoint).layers:
        for group in layer.groups:
            faults += _shared_scales_faults(quantized, group)
    _refuse(faults)
    return (
        f"{directory}: {len(manifest)} files and {len(quantized.checkpoint.tensors)} tensors, "
        f"{len(quantized.modules)} quantized layers: all as they should be"
    )


def _refuse(faults: list[str]) -> None:
    if faults:
        raise QuantizeError("\n".join(faults))


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"}."""
    if not directory.is_dir():
        raise QuantizeError(f"{directory}: not a directory")
    check_finished(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise QuantizeError(f"{directory}: no {MANIFEST}, this is not a QAM-W checkpoint")
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()
    ):
        raise QuantizeError(f"{path}: files must map every name to its bytes and sha256")
    return files


def _listed_file_faults(directory: Path, manifest: dict[str, dict[str, Any]]) -> list[str]:
    """Files that are missing or have other bytes than the manifest lists."""
    faults = []
    for file, entry in manifest.items():
        path = directory / file
        if ".." in path.parts or Path(file).is_absolute():
            faults.append(f"{directory / MANIFEST}: {file} is outside the directory")
        elif not path.is_file():
            faults.append(f"{path}: missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            faults.append(f"{path}: {size} bytes, the manifest says {entry['bytes']}")
        elif (digest := sha256_of(path)) != entry["sha256"]:
            faults.append(f"{path}: SHA-256 {digest}, the manifest says {entry['sha256']}")
    return faults


def _unlisted_file_faults(directory: Path, manifest: dict[str, dict[str, Any]]) -> list[str]:
    """Files that the manifest does not list, except hidden ones: .gitattributes, .cache."""
    present = set()
    for path in directory.rglob("*"):
        relative = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            present.add(relative.as_posix())
    unlisted = sorted(present - set(manifest) - {MANIFEST})
    return [f"{directory / file}: not in the manifest" for file in unlisted]


def _layer_faults(quantized: QuantizedCheckpoint, module: str) -> list[str]:
    """Shapes and dtypes of a layer's tensors; if they are right, their values."""
    return quantized.header_faults(module) or _layer_value_faults(quantized, module)


def _layer_value_faults(quantized: QuantizedCheckpoint, module: str) -> list[str]:
    checkpoint, num_inputs = quantized.checkpoint, quantized.modules[module].num_inputs
    names = [f"{module}.row_norms", f"{module}.input_scales"]
    (_, row_norms), (_, input_scales) = checkpoint.load(names)
    checks: dict[str, Callable[[], object]] = {
        "row_norms": lambda: check_row_norms(row_norms),
        "input_scales": lambda: check_input_scales(input_scales),
        "qweight": lambda: quantized.format.rotation_block_size_of(module, num_inputs),
    }
    faults = []
    for suffix, check in checks.items():
        try:
            check()
        except QamwError as error:
            file = checkpoint.tensors[f"{module}.{suffix}"].file
            faults.append(f"{file}: {module}: {error}")
    return faults


def _orphan_faults(quantized: QuantizedCheckpoint, info: TensorInfo) -> list[str]:
    """A part of a quantized layer that has no ``qweight``."""
    module, _, suffix = info.name.rpartition(".")
    if suffix not in LAYER_TENSORS or module in quantized.modules:
        return []
    return [f"{info.file}: {info.name} belongs to no quantized layer: {module}.qweight is missing"]


def _twice_stored_faults(quantized: QuantizedCheckpoint, info: TensorInfo) -> list[str]:
    """A plain weight of a layer that is quantized."""
    module, _, suffix = info.name.rpartition(".")
    if suffix != "weight" or module not in quantized.modules:
        return []
    return [f"{info.file}: {info.name} is stored beside {module}.qweight"]


def _unlisted_matrix_faults(quantized: QuantizedCheckpoint, info: TensorInfo) -> list[str]:
    """A plain matrix that a reader would look for as a quantized one."""
    module, _, suffix = info.name.rpartition(".")
    if suffix != "weight" or len(info.shape) != 2:
        return []
    if module in quantized.modules or module in quantized.format.ignore:
        return []
    return [f"{info.file}: {info.name} is neither quantized nor in config.json's ignore list"]


def _not_finite_faults(quantized: QuantizedCheckpoint, info: TensorInfo) -> list[str]:
    """A plain tensor with a value that is not finite."""
    if info.name.rpartition(".")[2] in LAYER_TENSORS:
        return []
    try:
        next(quantized.checkpoint.load_finite([info.name]))
    except QamwError as error:
        return [f"{info.file}: {error}"]
    return []


TENSOR_CHECKS: tuple[Callable[[QuantizedCheckpoint, TensorInfo], list[str]], ...] = (
    _orphan_faults,
    _twice_stored_faults,
    _unlisted_matrix_faults,
    _not_finite_faults,
)


def _shared_scales_faults(quantized: QuantizedCheckpoint, group: InputGroup) -> list[str]:
    """Layers that read one activation must scale it alike: it is scaled and rotated once."""
    first, *others = group.linears
    faults = []
    for linear in others:
        if not {first.name, linear.name} <= set(quantized.modules):
            continue
        names = [f"{first.name}.input_scales", f"{linear.name}.input_scales"]
        (_, expected), (_, scales) = quantized.checkpoint.load(names)
        if not torch.equal(expected, scales):
            faults.append(
                f"{quantized.directory}: {linear.name}.input_scales differs from that of "
                f"{first.name}, which reads the same input"
            )
    return faults
