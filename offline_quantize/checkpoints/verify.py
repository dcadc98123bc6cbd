"""Whether every byte and every tensor of a QAM-W checkpoint is as it should be.

Every check returns a list of faults, each one line that names the file and the tensor. Later checks
build on earlier ones: files as the manifest lists them; headers as the format describes them; the
tensors that the architecture wants; values; then input scales that layers share.
"""

import os
from pathlib import Path

import torch

from offline_quantize.checkpoints.listing import differences, find_files
from offline_quantize.checkpoints.quantized import QuantizedCheckpoint, open_quantized
from offline_quantize.errors import Option, QuantizeError
from offline_quantize.files import check_finished, json_bytes
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.copied import module_folders
from offline_quantize.model.structure import InputGroup, Structure
from qamw_kernels.errors import QamwError
from qamw_kernels.files import write_atomically
from qamw_kernels.format.index import INDEX, read_index
from qamw_kernels.format.manifest import MANIFEST, FileEntry, Manifest


def verify(directory: Path, sign: bool = False) -> str:
    """Check every file against the manifest, every tensor against format and architecture.

    Args:
        sign: write a new manifest if all else is correct: for a checkpoint whose files were changed
            on purpose.
    Returns:
        Lines that describe what was checked, and what is new in the manifest.
    Raises:
        QuantizeError: with every fault found, one per line.
    """
    if not directory.is_dir():
        raise QuantizeError(f"{directory}: not a directory")
    check_finished(directory)
    manifest = _read_manifest(directory, sign)
    files, faults = find_files(directory)
    changes = differences(directory, manifest, files)
    if sign:
        _refuse(faults)
    elif faults or changes:
        raise QuantizeError(
            "\n".join(faults + changes),
            f"\nif you changed files on purpose, qamw verify writes a new {MANIFEST} with ",
            Option("sign", True),
            ", provided that everything else is correct",
        )
    quantized = open_quantized(directory)
    _refuse(_shard_faults(quantized, files))
    structure = find_structure(quantized.checkpoint)
    _refuse(_architecture_faults(quantized, structure))
    _refuse(_value_faults(quantized))
    groups = (group for layer in structure.layers for group in layer.groups)
    _refuse([fault for group in groups for fault in _shared_scales_faults(quantized, group)])
    lines = [
        f"{directory}: {len(files)} files and {len(quantized.checkpoint.tensors)} tensors, "
        f"{len(quantized.modules)} quantized layers: all are correct"
    ]
    if sign:
        lines += changes or [f"{MANIFEST}: nothing to change"]
        _write_manifest(directory, files, manifest)
    return "\n".join(lines)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise QuantizeError("\n".join(faults))


def _read_manifest(directory: Path, sign: bool) -> Manifest:
    """The directory's manifest; an empty one if there is none and ``sign`` will write it."""
    if (directory / MANIFEST).exists():
        return Manifest.read(directory)
    if sign:
        return Manifest({})
    raise QuantizeError(f"{directory}: no {MANIFEST}, this is not a QAM-W checkpoint")


def _write_manifest(directory: Path, files: set[str], old: Manifest) -> None:
    entries = {name: FileEntry.of(directory / name) for name in files}
    content = json_bytes(Manifest(entries, old.sources).to_dict())
    write_atomically(directory / MANIFEST, lambda path: path.write_bytes(content))


def _shard_faults(quantized: QuantizedCheckpoint, files: set[str]) -> list[str]:
    """Shards that are not listed, and shards or tensors that only some readers would load.

    Args:
        files: that the manifest lists.
    """
    directory, tensors = quantized.directory, quantized.checkpoint.tensors
    shards = {info.file for info in tensors.values()}
    faults = [f"{directory / f}: a shard that is not in {MANIFEST}" for f in shards - files]
    modules = module_folders(directory)  # with weights of their own
    weights = {
        file
        for file in files
        if file.endswith(".safetensors") and os.path.dirname(file) not in modules
    }
    faults += [f"{directory / file}: not in {INDEX}" for file in weights - shards]
    if (directory / INDEX).is_file():
        indexed = set(read_index(directory))
        faults += [
            f"{tensors[name].file}: {name} is not in {INDEX}" for name in set(tensors) - indexed
        ]
    return sorted(faults)


def _architecture_faults(quantized: QuantizedCheckpoint, structure: Structure) -> list[str]:
    """Tensors that the model of config.json wants and that are not there, or have other shapes.

    Then tensors that it does not want, and quantized ones where it has no linear layer.
    """
    stored, tensors = quantized.decoded_names(), quantized.checkpoint.tensors
    expected = dict(structure.expected)
    for name, stack in structure.stacks.items():
        if name not in stored or name in quantized.format.stacks:
            del expected[name]
            expected |= {part: stack.shape_of(part) for part in stack.slices}
    faults = [
        f"{quantized.directory}: no tensor {name}, which the architecture of config.json has"
        for name in expected
        if name not in stored
    ]
    linears = {linear.name for linear in structure.linears()}
    if structure.head:
        linears.add(structure.head.name)
    for name, held_by in stored.items():
        info, module = tensors[held_by], name.removesuffix(".weight")
        shape, wanted = info.shape, expected.get(name)
        if module in quantized.modules:
            layer = quantized.modules[module]
            shape = layer.num_rows, layer.num_inputs
            if module not in linears:
                faults.append(
                    f"{info.file}: {held_by} belongs to no linear layer of config.json's "
                    "architecture"
                )
        elif name in structure.unwanted:
            faults.append(
                f"{info.file}: {name} belongs to no parameter of config.json's architecture"
            )
        if wanted is not None and shape != wanted:
            faults.append(
                f"{info.file}: {name} has shape {list(shape)}, expected {list(wanted)} by "
                "config.json"
            )
    return faults


def _value_faults(quantized: QuantizedCheckpoint) -> list[str]:
    """Values that the format does not allow."""
    faults = []
    for stored in quantized.decoded_names().values():
        try:
            quantized.check_values(stored)
        except QamwError as error:
            faults.append(f"{quantized.checkpoint.tensors[stored].file}: {error}")
    return faults


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
