"""The offline quantizer: a Hugging Face checkpoint in, a checkpoint that vLLM serves out."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from offline_quantize import report
from offline_quantize.calibration import DEFAULT_TEXT, Calibrator, calibration_tokens
from offline_quantize.encoder import encode_group
from offline_quantize.errors import QuantizeError
from offline_quantize.output import Output
from offline_quantize.plan import MAX_SHARD_BYTES, Plan, check_disk, make_plan
from qamw_kernels.codec import check_finite

Progress = Callable[[int, int], None]
"""Called with (weights done, weights in all) while a run goes on."""


def _usable_device(device: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return torch.empty(0, device=name).device
    except Exception as error:  # torch raises several kinds
        raise QuantizeError(f"--device {device}: {error}") from None


def fingerprint(plan: Plan, calibration: Path | None, tokens: torch.Tensor | None, device: torch.device) -> str:
    """Hash of everything that decides the output's bytes; ``--resume`` needs it unchanged."""
    directory = plan.checkpoint.directory
    sources = {}
    for file in sorted({info.file for info in plan.checkpoint.tensors.values()}):
        stat = (directory / file).stat()
        sources[file] = [stat.st_size, stat.st_mtime_ns]
    request = {
        "versions": [version(package) for package in ("qamw-vllm", "torch", "transformers", "matplotlib")], "device": device.type,
        "config": plan.checkpoint.config, "format": plan.format.to_dict(), "sources": sources,
        "shards": [[shard.file, [t.name for t in shard.tensors]] for shard in plan.shards],
        "calibration": calibration.name if calibration else None,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest() if tokens is not None else None,
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def quantize(model: Path | str, out: Path | str, bpw: float = 5.5, calibration: Path | str | None = DEFAULT_TEXT, tp_max: int = 8,
             ignore: Sequence[str] = (), device: str = "auto", resume: bool = False, progress: Progress | None = None,
             max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, Any]:
    """Quantise the checkpoint directory ``model`` into the new directory ``out``.

    Memory: one decoder layer, one output shard and, with calibration, the hidden states of the calibration tokens.

    Args:
        bpw: nominal bits per weight, 3.0 to 6.0 in halves.
        calibration: UTF-8 text file, or None for no calibration.
        tp_max: widest tensor parallelism that rotation blocks are chosen for.
        ignore: glob patterns of linear layers to leave as they are.
        device: "auto", "cpu" or "cuda".
        resume: continue an interrupted run of the same request.
    Returns:
        The report, as written to qamw_report.json.
    Raises:
        QuantizeError: before any work, if the request cannot be carried out; later, if a weight is not finite.
    """
    model, out = Path(model), Path(out)
    text = Path(calibration) if calibration is not None else None
    if model.resolve() in (out.resolve(), *out.resolve().parents):
        raise QuantizeError(f"{out}: the output must not be the model's own directory, nor inside it")
    Output.check_target(out, resume)
    torch_device = _usable_device(device)
    plan = make_plan(model, bpw, tp_max, ignore, max_shard_bytes)
    check_disk(plan, out)
    tokens = calibration_tokens(model, text) if text else None
    output = Output(out, fingerprint(plan, text, tokens, torch_device), resume)
    _write_shards(plan, output, tokens, torch_device, progress)
    return _write_rest(plan, output, text)


def _write_shards(plan: Plan, output: Output, tokens: torch.Tensor | None, device: torch.device, progress: Progress | None) -> None:
    open_shards = [shard for shard in plan.shards if shard.file not in output.files]
    end = max((shard.layers.stop for shard in open_shards), default=0)
    # With calibration, layers of finished shards are still passed through, up to the last layer that is needed.
    calibrator = Calibrator(plan.checkpoint, tokens, device) if tokens is not None and end else None
    done = 0
    for shard in plan.shards:
        wanted = shard in open_shards
        tensors: dict[str, torch.Tensor] = {}
        entries: list[dict[str, Any]] = []
        for layer in shard.layers:
            if wanted:
                made, notes = _quantize_layer(plan, layer, calibrator, device)
                tensors |= made
                entries += notes
            elif calibrator and layer < end:
                calibrator.run_layer(dict(plan.checkpoint.load(plan.layer_tensor_names(layer))), ())
            done += sum(linear.num_rows * linear.num_inputs for group in plan.layers[layer] for linear in group)
            if progress:
                progress(done, plan.num_quantized_weights)
        if wanted:
            tensors |= plan.checkpoint.load(t.name for t in shard.tensors if not shard.layers)
            output.write_shard(shard.file, {t.name: tensors[t.name] for t in shard.tensors}, entries)


def _quantize_layer(plan: Plan, layer: int, calibrator: Calibrator | None,
                    device: torch.device) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The output tensors of a decoder layer, and the report's entries."""
    weights = dict(plan.checkpoint.load(plan.layer_tensor_names(layer)))
    groups = plan.layers[layer]
    for linear in (linear for group in groups for linear in group):  # before calibration spreads it
        check_finite(weights[f"{linear.name}.weight"], f"{linear.name}.weight")
    statistics = calibrator.run_layer(weights, groups) if calibrator else [None] * len(groups)
    entries = []
    for group, stats in zip(groups, statistics, strict=True):
        index_bits = plan.format.index_bits_of(group[0].name)
        block = plan.format.rotation_block_size_of(group[0].name, group[0].num_inputs)
        encoded = encode_group({linear.name: weights.pop(f"{linear.name}.weight").to(device) for linear in group}, index_bits, block, stats)
        for linear in group:
            quantized = encoded.quantized[linear.name]
            stored = {suffix: getattr(quantized, suffix).cpu().clone() for suffix in ("qweight", "row_norms", "input_scales")}
            weights |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in stored.items()}
            entries.append(report.layer_entry(linear, quantized, encoded.exponent, encoded.errors[linear.name], stored.values()))
    return weights, entries


def _write_rest(plan: Plan, output: Output, calibration: Path | None) -> dict[str, Any]:
    """Copies, report, plot, model card, and at last index, manifest and config."""
    source = plan.checkpoint
    for file in source.other_files():
        # The model card is ours; the model's own stays beside it.
        target = "README.base-model.md" if file == "README.md" else file
        output.write(target, functools.partial(shutil.copyfile, source.directory / file))
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    entries = [entry for shard in plan.shards for entry in output.notes[shard.file]]
    result = report.make_report(plan, entries, calibration)
    report.write_report(output, result, plan)
    output.finish(weight_map, plan.output_bytes, source.config | {"quantization_config": plan.format.to_dict()})
    return result
