"""What a run reports: a JSON file, a plot and a model card, all of them the same for the same request."""

import math
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from offline_quantize.output.directory import Output, json_bytes
from offline_quantize.planning.plan import HEAD_INDEX_BITS, Plan
from offline_quantize.model.structure import Linear
from qamw_kernels.codec.encode import QuantizedWeight

REPORT = "qamw_report.json"
PLOT = "qamw_report.png"
BASE_CARD = "README.base-model.md"  # the model card is ours; the model's own stays beside it
CARD = "README.md"


def layer_entry(linear: Linear, quantized: QuantizedWeight, errors: dict[str, float],
                stored: Iterable[torch.Tensor]) -> dict[str, Any]:
    """One linear's line of the report; errors are relative squared errors, SQNR is in dB."""
    num_bytes = sum(t.numel() * t.itemsize for t in stored)
    return {
        "name": linear.name,
        "shape": [linear.num_rows, linear.num_inputs],
        "index_bits": quantized.index_bits,
        "rotation_block_size": quantized.rotation_block_size,
        "effective_bits_per_weight": 8 * num_bytes / (linear.num_rows * linear.num_inputs),
        "sqnr_db": -10 * math.log10(errors["nmse"]) if errors["nmse"] > 0 else None,
        **errors,
    }


def make_report(plan: Plan, entries: list[dict[str, Any]], method: dict[str, Any]) -> dict[str, Any]:
    """The whole report: how, totals, worst layers, layers (experts, mostly) that no calibration token reached, every layer.

    Args:
        method: "calibration", the name of the text or None; "calibration_tokens"; "encoder"; "rates".
    """
    key = "output_nmse" if method["calibration"] else "nmse"
    worst = sorted((entry for entry in entries if key in entry), key=lambda entry: -entry[key])[:5]
    return {
        "qamw_version": version("qamw-vllm"),
        **method,
        "nominal_bits_per_weight": plan.nominal_bits_per_weight,
        "effective_bits_per_weight": plan.effective_bits_per_weight,
        "quantized_weights": plan.num_quantized_weights,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "tensor_parallel_sizes": list(plan.tensor_parallel_sizes),
        "not_reached": [entry["name"] for entry in entries if key not in entry],
        "worst_layers": [f"{entry['name']}: {key} {entry[key]:.2e}" for entry in worst],
        "layers": entries,
    }


def write_report(output: Output, result: dict[str, Any], plan: Plan) -> None:
    output.write(REPORT, lambda path: path.write_bytes(json_bytes(result)))
    output.write(PLOT, lambda path: _plot(path, result))
    output.write(CARD, lambda path: path.write_bytes(_card(result, plan).encode()))


def _plot(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    calibrated = result["calibration"] is not None
    key, label = ("output_nmse", "output error") if calibrated else ("nmse", "weight error")
    by_role: dict[str, list[tuple[int, float]]] = {}
    for entry in result["layers"]:
        parts = entry["name"].split(".")
        layer = next((int(part) for part in parts if part.isdigit()), 0)
        role = ".".join(part for part in parts[-2:] if not part.isdigit())
        by_role.setdefault(role, []).append((layer, entry.get(key) or math.nan))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for role, points in by_role.items():
        alone = len({layer for layer, _ in points}) == len(points)  # and not one of many experts
        axes.semilogy(*zip(*points, strict=True), marker=".", linestyle="-" if alone else "", label=role)
    axes.set(xlabel="decoder layer", ylabel=f"{label} (squared, relative)",
             title=f"{result['effective_bits_per_weight']:.3f} effective bits per weight")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _card(result: dict[str, Any], plan: Plan) -> str:
    name = plan.checkpoint.name
    worst = "\n".join(f"- {line}" for line in result["worst_layers"])
    sizes = ", ".join(map(str, result["tensor_parallel_sizes"]))
    text = f"{result['calibration']}, {result['calibration_tokens']} tokens" if result["calibration"] else "none"
    head = f" The head has {HEAD_INDEX_BITS / 2:g} bits per weight, beside that." if plan.head else ""
    missed = len(result["not_reached"])
    uncalibrated = ""
    if missed:
        uncalibrated = f"\nNo calibration token reached {missed} of the layers, or mattered to them: they were coded without.\n"
    kept = ", ".join(f"`{module}`" for module in plan.format.ignore[:8]) + (" ..." if len(plan.format.ignore) > 8 else "")
    return f"""---
base_model: {name}
library_name: vllm
tags: [qamw]
---
# {name}, QAM-W {result["nominal_bits_per_weight"]:.3g} bpw

{result["quantized_weights"] / 1e6:.1f} million weights of the decoder layers, {result["effective_bits_per_weight"]:.3f} effective bits each
(every stored byte counted); {result["output_bytes"] / 1e6:.1f} MB instead of {result["source_bytes"] / 1e6:.1f} MB.{head}
Calibration: {text}; encoder {result["encoder"]}, {result["rates"]} rates. Made by qamw-vllm {result["qamw_version"]}.

With the vLLM plugin of qamw-vllm installed:

    vllm serve . --quantization qamw

Tensor-parallel sizes: {sizes}. Not quantised: {kept}.
{uncalibrated}
Largest errors (all layers in {REPORT} and {PLOT}):

{worst}
"""
