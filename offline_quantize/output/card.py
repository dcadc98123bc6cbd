"""The model card of a quantized checkpoint, the same for the same request."""

import json
import re

from offline_quantize.files import PLOT, REPORT
from offline_quantize.output.report import Report
from offline_quantize.planning.plan import HEAD_INDEX_BITS, Plan
from qamw_kernels.format.rates import nominal_bits_per_weight

NUM_IGNORED_NAMES = 8


def model_card(plan: Plan, report: Report) -> str:
    """README.md of a quantized checkpoint."""
    name = plan.checkpoint.name
    worst = "\n".join(f"- {line}" for line in report.worst_layers)
    sizes = ", ".join(map(str, report.tensor_parallel_sizes))
    return f"""---
base_model: {_yaml(name)}
library_name: vllm
tags: [qamw]
---
# {name}, QAM-W {report.nominal_bits_per_weight:.3g} bpw

{report.quantized_weights / 1e6:.1f} million weights of the decoder layers, \
{report.effective_bits_per_weight:.3f} effective bits each
(every stored byte counted); {report.output_bytes / 1e6:.1f} MB instead of \
{report.source_bytes / 1e6:.1f} MB.{_head(plan)}{_source(report)}
Calibration: {_calibration(report)}; encoder {report.encoder}, {report.code} code, \
{report.rates} rates. \
Made by qamw-vllm {report.qamw_version}.

With the vLLM plugin of qamw-vllm installed:

    vllm serve . --quantization qamw

Tensor-parallel sizes: {sizes}. Not quantized: {_unquantized(plan)}.
{_not_reached(report)}
Largest errors (all layers in {REPORT} and {PLOT}):

{worst}
"""


def _yaml(text: str) -> str:
    """A string in YAML, quoted where it must be: a directory may have any name."""
    return (
        text if re.fullmatch(r"[A-Za-z0-9][\w./-]*", text) else json.dumps(text, ensure_ascii=False)
    )


def _head(plan: Plan) -> str:
    if not plan.head:
        return ""
    bits = nominal_bits_per_weight(HEAD_INDEX_BITS)
    return f" In addition, the head has {bits:g} bits per weight."


def _source(report: Report) -> str:
    if not report.source_encoding:
        return ""
    return f" The model was already quantized ({report.source_encoding}), and was decoded first."


def _calibration(report: Report) -> str:
    if report.calibration is None:
        return "none"
    return f"{report.calibration}, {report.calibration_tokens} tokens"


def _unquantized(plan: Plan) -> str:
    names = plan.format.ignore
    listed = ", ".join(f"`{module}`" for module in names[:NUM_IGNORED_NAMES])
    return listed + (" ..." if len(names) > NUM_IGNORED_NAMES else "")


def _not_reached(report: Report) -> str:
    missed = len(report.not_reached)
    if not missed:
        return ""
    return (
        f"\nNo calibration token reached {missed} of the layers, or had an effect there: "
        "they were quantized without calibration.\n"
    )
