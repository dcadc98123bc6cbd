"""What is inside a QAM-W checkpoint, as a table."""

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
        QuantizeError: not a QAM-W checkpoint, unfinished, a tensor is missing, or a report that
            cannot be read.
    """
    quantized = open_quantized(directory)
    entries = _report_entries(directory)
    lines = [HEADER]
    for module in sorted(quantized.modules, key=_in_order_of_numbers):
        lines.append(_layer_line(quantized, module, entries.get(module, {})))
    num_weights = sum(shape.num_weights for shape in quantized.modules.values())
    lines.append(
        f"{len(quantized.modules)} layers, {num_weights / 1e6:.1f} M weights, "
        f"{quantized.effective_bits_per_weight:.3f} effective bpw; "
        f"not quantized: {', '.join(quantized.format.ignore)}"
    )
    return "\n".join(lines)


def _report_entries(directory: Path) -> dict[str, dict[str, Any]]:
    """The report's entry of every layer, by module name; empty without a report."""
    path = directory / REPORT
    if not path.is_file():
        return {}
    layers = read_json(path).get("layers")
    if not isinstance(layers, list) or not all(isinstance(e, dict) and "name" in e for e in layers):
        raise QuantizeError(f"{path}: layers must be an array of objects that have a name")
    for entry in layers:
        for figure in ("sqnr_db", "output_nmse"):
            if not isinstance(entry.get(figure), int | float | None):
                raise QuantizeError(
                    f"{path}: {figure} of {entry['name']} must be a number, got {entry[figure]!r}"
                )
    return {entry["name"]: entry for entry in layers}


def _in_order_of_numbers(module: str) -> list[tuple[bool, int | str]]:
    """Sort key: layer 2 before layer 10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else part) for part in module.split(".")
    ]


def _layer_line(quantized: QuantizedCheckpoint, module: str, entry: dict[str, Any]) -> str:
    shape = quantized.modules[module]
    effective = 8 * shape.num_bytes / shape.num_weights
    block_size = quantized.format.rotation_block_size_of(module, shape.num_inputs)
    sqnr, error = entry.get("sqnr_db"), entry.get("output_nmse")
    return (
        f"{module:48} {shape.num_rows:6}x{shape.num_inputs:6} "
        f"{nominal_bits_per_weight(shape.index_bits):5g} {effective:6.3f} {block_size:5} "
        f"{'' if sqnr is None else f'{sqnr:.2f}':>8} {'' if error is None else f'{error:.2e}':>12}"
    )
