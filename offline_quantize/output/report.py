"""What a run reports: how well every layer is represented, as JSON and as a plot.

Report and plot are the same bytes for the same request.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from offline_quantize.encoding.group import Errors
from offline_quantize.model.structure import Linear
from qamw_kernels.format.rates import QuantizedShape
from qamw_kernels.format.weight import QuantizedWeight

NUM_WORST_LAYERS = 5


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear layer.

    Attributes:
        name: of the module.
        shape: [num_rows, num_inputs] of its weight.
        index_bits: per pair of weights.
        rotation_block_size: Hadamard width.
        effective_bits_per_weight: all its stored bytes, without the codebook.
        sqnr_db: signal to quantization noise of the weight, in dB; None where there is no noise.
        nmse: squared error of the weight, relative to its squared norm.
        output_nmse: the same of the layer's output on the calibration text; None where no token
            reached the layer, or without calibration.
    """

    name: str
    shape: tuple[int, int]
    index_bits: int
    rotation_block_size: int
    effective_bits_per_weight: float
    sqnr_db: float | None
    nmse: float
    output_nmse: float | None

    @staticmethod
    def of(linear: Linear, quantized: QuantizedWeight, errors: Errors) -> "LayerReport":
        """The report of a linear from its quantized weight, and the errors of that."""
        shape = QuantizedShape(linear.num_rows, linear.num_inputs, quantized.index_bits)
        return LayerReport(
            name=linear.name,
            shape=(linear.num_rows, linear.num_inputs),
            index_bits=quantized.index_bits,
            rotation_block_size=quantized.rotation_block_size,
            effective_bits_per_weight=shape.stored_bits_per_weight,
            sqnr_db=-10 * math.log10(errors.nmse) if errors.nmse > 0 else None,
            nmse=errors.nmse,
            output_nmse=errors.output_nmse,
        )

    @staticmethod
    def from_dict(entry: Mapping[str, Any]) -> "LayerReport":
        """The inverse of :meth:`to_dict`."""
        num_rows, num_inputs = entry["shape"]
        values = {"output_nmse": None, **entry, "shape": (num_rows, num_inputs)}
        return LayerReport(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of qamw_report.json; without ``output_nmse`` where that is None."""
        entry = asdict(self)
        return {key: entry[key] for key in entry if key != "output_nmse" or entry[key] is not None}


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run.

    Attributes:
        qamw_version: of this package.
        calibration: file name of the calibration text, None without.
        calibration_tokens: how many tokens of it were read.
        encoder: as in :class:`~offline_quantize.planning.request.QuantizeRequest`.
        code: likewise.
        rates: likewise.
        nominal_bits_per_weight: what the indices take, on average over the decoder layers.
        effective_bits_per_weight: all stored bytes of the quantized decoder layers.
        quantized_weights: number of weights in them.
        source_bytes: of the model's tensors, as they are on disk.
        source_encoding: how the model was quantized before; empty for a plain one.
        output_bytes: of the tensors that were written.
        tensor_parallel_sizes: that the result can be served with.
        layers: every quantized linear, the head last.
    """

    qamw_version: str
    calibration: str | None
    calibration_tokens: int
    encoder: str
    code: str
    rates: str
    nominal_bits_per_weight: float
    effective_bits_per_weight: float
    quantized_weights: int
    source_bytes: int
    source_encoding: str = ""
    output_bytes: int
    tensor_parallel_sizes: tuple[int, ...]
    layers: tuple[LayerReport, ...]

    @property
    def error_name(self) -> str:
        """The error that matters most, as a name in the JSON of a layer."""
        return "nmse" if self.calibration is None else "output_nmse"

    def error_of(self, layer: LayerReport) -> float | None:
        """The error that matters most, of one layer; None where it is not known."""
        return layer.nmse if self.calibration is None else layer.output_nmse

    @property
    def not_reached(self) -> list[str]:
        """Names of the layers, mostly experts, that no calibration token reached."""
        return [layer.name for layer in self.layers if self.error_of(layer) is None]

    @property
    def worst_layers(self) -> list[str]:
        """Lines about the layers with the largest errors."""
        known = [(self.error_of(layer), layer.name) for layer in self.layers]
        errors = [(error, name) for error, name in known if error is not None]
        errors.sort(key=lambda item: -item[0])
        return [
            f"{name}: {self.error_name} {error:.2e}" for error, name in errors[:NUM_WORST_LAYERS]
        ]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of qamw_report.json."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["layers"]  # they come last
        if not self.source_encoding:
            del values["source_encoding"]
        return {
            **values,
            "not_reached": self.not_reached,
            "worst_layers": self.worst_layers,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def plot(path: Path, report: Report) -> None:
    """Write a PNG: the error of every layer, a line for each kind of linear."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for role, points in _points_by_role(report).items():
        alone = len({layer for layer, _ in points}) == len(points)  # one per layer, so no experts
        axes.semilogy(
            *zip(*points, strict=True), marker=".", linestyle="-" if alone else "", label=role
        )
    label = "weight error" if report.calibration is None else "output error"
    axes.set(
        xlabel="decoder layer",
        ylabel=f"{label} (squared, relative)",
        title=f"{report.effective_bits_per_weight:.3f} effective bits per weight",
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _points_by_role(report: Report) -> dict[str, list[tuple[int, float]]]:
    """Last parts of a module's name -> (decoder layer, error) of each such module."""
    by_role: dict[str, list[tuple[int, float]]] = {}
    for entry in report.layers:
        parts = entry.name.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), 0)
        role = ".".join(part for part in parts[-2:] if not part.isdigit())
        error = report.error_of(entry) or math.nan  # zero has no place on a logarithmic axis
        by_role.setdefault(role, []).append((layer, error))
    return by_role
