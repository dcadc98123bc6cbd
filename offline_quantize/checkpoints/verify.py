"""Look into a QAM-W checkpoint: what is inside, and whether every byte and every tensor is as it should be."""

from pathlib import Path

import torch

from offline_quantize.model.checkpoint import Checkpoint, read_json
from offline_quantize.errors import QuantizeError
from offline_quantize.output.directory import MANIFEST, PROGRESS, sha256_of
from offline_quantize.output.report import REPORT
from offline_quantize.model.structure import find_structure
from qamw_kernels.format.codebook import codebook_bytes
from qamw_kernels.codec.encode import check_input_scales, check_row_norms
from qamw_kernels.format.config import LAYER_TENSORS, QUANT_METHOD, FormatError, QamwFormat, layer_tensors


def _check_finished(directory: Path) -> None:
    if (directory / PROGRESS).is_file():
        raise QuantizeError(f"{directory}: unfinished: qamw quantize continues with --resume, qamw dequantize only in a new directory")


def open_quantized(directory: Path) -> tuple[Checkpoint, QamwFormat, dict[str, tuple[int, int]]]:
    """A QAM-W checkpoint, its format, and [N, K] of every quantised module.

    Raises:
        QuantizeError: not a QAM-W checkpoint, or unfinished.
    """
    _check_finished(directory)
    checkpoint = Checkpoint(directory)
    if not checkpoint.config.get("quantization_config"):
        raise QuantizeError(f"{directory / 'config.json'}: no quantization_config, this is not a QAM-W checkpoint")
    try:
        fmt = QamwFormat.from_dict(checkpoint.config["quantization_config"])
    except FormatError as error:
        raise QuantizeError(f"{directory / 'config.json'}: {error}") from None
    modules = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(".qweight"):
            if len(info.shape) != 3:
                raise QuantizeError(f"{info.file}: {name} has shape {list(info.shape)}, expected [index_bits, N, K / 64]")
            modules[name.removesuffix(".qweight")] = (info.shape[1], info.shape[2] * 64)
    for name, (rows, inputs) in modules.items():
        for suffix in layer_tensors(rows, inputs, fmt.index_bits_of(name)):
            if f"{name}.{suffix}" not in checkpoint.tensors:
                raise QuantizeError(f"{directory}: {name}.{suffix} is missing")
    if not modules:
        raise QuantizeError(f"{directory}: no quantised layer found")
    return checkpoint, fmt, modules


def effective_bits_per_weight(directory: Path) -> float | None:
    """Stored bits per quantised weight, tensors and codebooks; None if the checkpoint is plain or of another method."""
    if (read_json(directory / "config.json").get("quantization_config") or {}).get("quant_method") != QUANT_METHOD:
        return None
    checkpoint, fmt, modules = open_quantized(directory)
    num_bytes = sum(checkpoint.tensors[f"{name}.{suffix}"].num_bytes for name, (rows, inputs) in modules.items()
                    for suffix in layer_tensors(rows, inputs, fmt.index_bits_of(name)))
    num_bytes += codebook_bytes(map(fmt.index_bits_of, modules))
    return 8 * num_bytes / sum(rows * inputs for rows, inputs in modules.values())


def inspect(directory: Path) -> str:
    """One line per quantised layer, and totals, as text."""
    checkpoint, fmt, modules = open_quantized(directory)
    entries = {e["name"]: e for e in read_json(directory / REPORT)["layers"]} if (directory / REPORT).is_file() else {}
    lines = [f"{'layer':48} {'N x K':>13} {'bpw':>5} {'eff.':>6} {'block':>5} {'SQNR dB':>8} {'output error':>12}"]
    total_bytes = total_weights = 0
    for name in sorted(modules, key=lambda n: [(part.isdigit(), int(part) if part.isdigit() else part) for part in n.split(".")]):
        rows, inputs = modules[name]
        bits = fmt.index_bits_of(name)
        num_bytes = sum(checkpoint.tensors[f"{name}.{s}"].num_bytes for s in layer_tensors(rows, inputs, bits))
        total_bytes, total_weights = total_bytes + num_bytes, total_weights + rows * inputs
        entry = entries.get(name, {})
        sqnr, error = entry.get("sqnr_db"), entry.get("output_nmse")
        figures = f"{'' if sqnr is None else f'{sqnr:.2f}':>8} {'' if error is None else f'{error:.2e}':>12}"
        lines.append(f"{name:48} {rows:6}x{inputs:6} {bits / 2:5g} {8 * num_bytes / (rows * inputs):6.3f} "
                     f"{fmt.rotation_block_size_of(name, inputs):5} {figures}")
    total_bytes += codebook_bytes(map(fmt.index_bits_of, modules))
    lines.append(f"{len(modules)} layers, {total_weights / 1e6:.1f} M weights, {8 * total_bytes / total_weights:.3f} effective bpw; "
                 f"not quantised: {', '.join(fmt.ignore)}")
    return "\n".join(lines)


def verify(directory: Path) -> str:
    """Check every file against the manifest and every tensor against the format.

    Returns:
        A line that says what was checked.
    Raises:
        QuantizeError: with every fault found, one per line.
    """
    if not directory.is_dir():
        raise QuantizeError(f"{directory}: not a directory")
    _check_finished(directory)
    if not (directory / MANIFEST).is_file():
        raise QuantizeError(f"{directory}: no {MANIFEST}, this is not a QAM-W checkpoint")
    manifest = read_json(directory / MANIFEST).get("files")
    if not isinstance(manifest, dict) or not all(isinstance(e, dict) and {"bytes", "sha256"} <= set(e) for e in manifest.values()):
        raise QuantizeError(f"{directory / MANIFEST}: files must map every name to its bytes and sha256")
    faults = []
    for file, entry in manifest.items():
        path = directory / file
        if ".." in path.parts or Path(file).is_absolute():
            faults.append(f"{directory / MANIFEST}: {file} is outside the directory")
        elif not path.is_file():
            faults.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{path}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        elif sha256_of(path) != entry["sha256"]:
            faults.append(f"{path}: SHA-256 {sha256_of(path)}, the manifest says {entry['sha256']}")
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    present = {file for file in present if not any(part.startswith(".") for part in Path(file).parts)}  # .gitattributes, .cache
    faults += [f"{directory / file}: not in the manifest" for file in sorted(present - set(manifest) - {MANIFEST})]
    if faults:
        raise QuantizeError("\n".join(faults))

    checkpoint, fmt, modules = open_quantized(directory)
    for name, (rows, inputs) in modules.items():
        faults += _layer_faults(checkpoint, fmt, name, rows, inputs)
    for name, info in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in LAYER_TENSORS and module not in modules:
            faults.append(f"{info.file}: {name} belongs to no quantised layer: {module}.qweight is missing")
        if suffix == "weight" and module in modules:
            faults.append(f"{info.file}: {name} is stored beside {module}.qweight")
        if suffix == "weight" and len(info.shape) == 2 and module not in modules and module not in fmt.ignore:
            faults.append(f"{info.file}: {name} is neither quantised nor in config.json's ignore list")
        if suffix not in LAYER_TENSORS:
            try:
                next(checkpoint.load_finite([name]))
            except ValueError as error:
                faults.append(f"{info.file}: {error}")
    for groups in find_structure(directory).layers if not faults else ():
        faults += [f"{directory}: {linear.name}.input_scales differs from that of {group[0].name}, which reads the same input"
                   for group in groups for linear in group[1:] if {linear.name, group[0].name} <= set(modules)
                   and not torch.equal(*(t for _, t in checkpoint.load(f"{x.name}.input_scales" for x in (group[0], linear))))]
    if faults:
        raise QuantizeError("\n".join(faults))
    return (f"{directory}: {len(manifest)} files and {len(checkpoint.tensors)} tensors, {len(modules)} quantised layers: "
            "all as they should be")


def _layer_faults(checkpoint: Checkpoint, fmt: QamwFormat, name: str, rows: int, inputs: int) -> list[str]:
    faults = []
    for suffix, (shape, dtype) in layer_tensors(rows, inputs, fmt.index_bits_of(name)).items():
        info = checkpoint.tensors[f"{name}.{suffix}"]
        if (info.shape, info.dtype) != (shape, dtype):
            faults.append(f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}")
    if faults:
        return faults
    (_, norms), (_, scales) = checkpoint.load([f"{name}.row_norms", f"{name}.input_scales"])
    for suffix, check in (("row_norms", lambda: check_row_norms(norms)), ("input_scales", lambda: check_input_scales(scales)),
                          ("qweight", lambda: fmt.rotation_block_size_of(name, inputs))):
        try:
            check()
        except ValueError as error:
            faults.append(f"{checkpoint.tensors[f'{name}.{suffix}'].file}: {name}: {error}")
    return faults
