"""What is inside a QAM-W checkpoint, as a table."""

import os
import reprlib
import sys
from pathlib import Path
from typing import Any

from offline_quantize.checkpoints.quantized import QuantizedCheckpoint, open_quantized
from offline_quantize.errors import QuantizeError
from offline_quantize.files import REPORT
from qamw_kernels.files import read_json
from qamw_kernels.format.rates import nominal_bits_per_weight

HEADER = (
    f"{'layer':48} {'N x K':>13} {'bpw':>5} {'eff.':>6} {'block':>5} {'SQNR dB':>8} "
    f"{'output error':>12}"
)


def inspect(directory: Path) -> str:
    """One line per quantized layer, and totals, as text; errors of layers come from the report.

    Raises:
        QuantizeError: not a QAM-W checkpoint, unfinished, headers that do not fit, or a report that
            cannot be used.
    """
    quantized = open_quantized(directory)
    entries = _report_entries(directory)
    lines = [HEADER]
    for module in sorted(quantized.modules, key=_in_order_of_numbers):
        lines.append(_layer_line(quantized, module, entries.get(module, {})))
    num_weights = sum(shape.num_weights for shape in quantized.modules.values())
    lines.append(
        f"{len(quantized.modules)} layers, {num_weights / 1e6:.1f} M weights, "
        f"{quantized.effective_bits_per_weight:.3f} effective bpw; {quantized.format.code} code; "
        f"not quantized: {', '.join(map(_shown, quantized.format.ignore))}"
    )
    lines.append("only headers and the report were read; qamw verify also checks bytes and values")
    return "\n".join(lines)


def _report_entries(directory: Path) -> dict[str, dict[str, Any]]:
    """The report's entry of every layer, by module name; empty without a report."""
    path = directory / REPORT
    if not os.path.lexists(path):
        return {}
    layers = read_json(path).get("layers")
    if not isinstance(layers, list):
        raise QuantizeError(f"{path}: layers must be an array, got {type(layers).__name__}")
    entries: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(layers):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in entries:
            raise QuantizeError(f"{path}: layers[{number}] must be an object with a unique name")
        for figure in ("sqnr_db", "output_nmse"):
            value = entry.get(figure)
            if value is not None and not _is_number(value):
                raise QuantizeError(
                    f"{path}: {figure} of {_shown(name)} must be a number, "
                    f"got {reprlib.repr(value)}"
                )
        entries[name] = entry
    return entries


def _is_number(value: Any) -> bool:
    """Whether JSON has a finite number here that a float can hold; true and false are none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _shown(name: str) -> str:
    """A module's name without control characters, which a terminal would obey."""
    return name if name.isprintable() else ascii(name)


def _in_order_of_numbers(module: str) -> list[tuple[bool, int | str]]:
    """Sort key: layer 2 before layer 10."""
    parts = module.split(".")
    return [(True, int(p)) if p.isdecimal() and len(p) < 10 else (False, p) for p in parts]


def _layer_line(quantized: QuantizedCheckpoint, module: str, entry: dict[str, Any]) -> str:
    shape = quantized.modules[module]
    block_size = quantized.format.rotation_block_size_of(module, shape.num_inputs)
    sqnr, error = entry.get("sqnr_db"), entry.get("output_nmse")
    return (
        f"{_shown(module):48} {shape.num_rows:6}x{shape.num_inputs:6} "
        f"{nominal_bits_per_weight(shape.index_bits):5g} "
        f"{shape.stored_bits_per_weight:6.3f} {block_size:5} "
        f"{'' if sqnr is None else f'{sqnr:.2f}':>8} {'' if error is None else f'{error:.2e}':>12}"
    )
