"""The offline quantizer: a Hugging Face checkpoint in, a checkpoint that vLLM serves out."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from offline_quantize.output import report
from offline_quantize.planning.allocation import allocate
from offline_quantize.calibration.hessians import DEFAULT_TEXT, MIN_TOKENS, Calibrator, calibration_windows, default_num_tokens
from offline_quantize.encoding.group import ENCODERS, encode_group
from offline_quantize.errors import QuantizeError
from offline_quantize.output.directory import MANIFEST, Output, another_request
from offline_quantize.planning.plan import MAX_SHARD_BYTES, Plan, check_disk, existing_parent, index_bits_for, make_plan
from offline_quantize.calibration.sensitivity import Sensitivity, from_state, measure_sensitivities, to_state
from offline_quantize.model.structure import Linear
from qamw_kernels.codec.encode import QuantizedWeight, decode_weight
from qamw_kernels.format.config import LAYER_TENSORS
from qamw_kernels.format.sharding import TP_MAX

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, weights done, weights in all) while a run goes on."""
RATES = ("mixed", "uniform")


def usable_device(device: str) -> torch.device:
    """The torch device of a --device option: auto, cpu, cuda."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return torch.empty(0, device=name).device
    except Exception as error:  # torch raises several kinds
        raise QuantizeError(f"--device {device}: {error}") from None


def fingerprint(plan: Plan, method: dict[str, Any], tokens: torch.Tensor | None, device: torch.device) -> str:
    """Hash of everything that decides the output's bytes; ``--resume`` needs it unchanged."""
    directory = plan.checkpoint.directory
    sources = {}
    for file in sorted({info.file for info in plan.checkpoint.tensors.values()}):
        stat = (directory / file).stat()
        sources[file] = [stat.st_size, stat.st_mtime_ns]
    request = {
        "versions": [version(package) for package in ("qamw-vllm", "torch", "transformers", "matplotlib")],
        "device": device.type, "method": method,
        "config": plan.checkpoint.config, "format": plan.format.to_dict(), "sources": sources,
        "shards": [[shard.file, [t.name for t in shard.tensors]] for shard in plan.shards],
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest() if tokens is not None else None,
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def quantize(model: Path | str, out: Path | str, bpw: float = 5.5, calibration: Path | str | None = DEFAULT_TEXT, tp_max: int = TP_MAX,
             ignore: Sequence[str] = (), device: str = "auto", resume: bool = False, progress: Progress | None = None,
             max_shard_bytes: int = MAX_SHARD_BYTES, encoder: str | None = None,
             rates: str | None = None, quantize_lm_head: bool = False, calibration_tokens: int | None = None) -> dict[str, Any]:
    """Quantise the checkpoint directory ``model`` into the new directory ``out``.

    Memory: one decoder layer, one output shard and, with calibration, the hidden states of the calibration tokens and the
    Hessians of a layer.

    Args:
        bpw: bits per weight, 3 to 6: nominal in halves, effective between them (:meth:`Plan.index_bits_within`).
        calibration: UTF-8 text file, or None for no calibration.
        calibration_tokens: of that text; None for :func:`default_num_tokens`, or what the text has if that is less.
        tp_max: widest tensor parallelism that rotation blocks are chosen for.
        ignore: glob patterns of linear layers to leave as they are.
        device: "auto", "cpu" or "cuda".
        resume: continue an interrupted run of the same request.
        rates: "mixed" measures sensitivities: bits go to the layers, and calibration tokens count, by what their errors cost;
            "uniform" treats all alike, in about half the time; None for mixed with calibration, uniform without.
        quantize_lm_head: also the head, at 6 bits per weight; it no longer shares its weight with the embeddings.
        encoder: "feedback" or "nearest"; None for feedback with calibration, nearest without.
    Returns:
        The report, as written to qamw_report.json.
    Raises:
        QuantizeError: before any work, if the request cannot be carried out.
        ValueError: a tensor is not finite; known when it is read.
    """
    model, out = Path(model), Path(out)
    text = Path(calibration) if calibration is not None else None
    encoder, rates = chosen_method(bpw, text, encoder, rates, calibration_tokens)
    Output.check_target(out, model, resume)
    torch_device = usable_device(device)
    plan = make_plan(model, bpw, tp_max, ignore, max_shard_bytes, quantize_lm_head)
    tokens = _read_tokens(plan, text, calibration_tokens) if text else None
    num_tokens = tokens.numel() if tokens is not None else 0
    # A name that is no UTF-8 can be neither in JSON nor in the model card.
    name = os.fsencode(text.name).decode(errors="replace") if text else None
    method = {"calibration": name, "calibration_tokens": num_tokens, "encoder": encoder, "rates": rates}
    check_disk(plan, out, bpw, num_tokens if rates == "mixed" else 0)
    sensitivities: list[list[Sensitivity]] = []
    if tokens is not None and rates == "mixed":
        sensitivities = from_state(Output.kept_state(out)) if resume else []
        if sensitivities and [len(groups) for groups in sensitivities] != [len(groups) for groups in plan.layers]:
            raise another_request(out)
        note = functools.partial(progress, "sensitivity") if progress else None
        sensitivities = sensitivities or measure_sensitivities(plan, tokens, torch_device, existing_parent(out), note)
        plan = _allocate(plan, bpw, sensitivities)
    output = Output(out, fingerprint(plan, method, tokens, torch_device), resume)
    if sensitivities:
        output.keep_state(to_state(sensitivities))
    unfinished = any(shard.file not in output.files for shard in plan.shards)
    calibrator = Calibrator(plan.checkpoint, tokens, torch_device) if tokens is not None and unfinished else None
    _write_shards(plan, output, calibrator, sensitivities, encoder, torch_device, progress)
    return _write_rest(plan, output, method)


def _read_tokens(plan: Plan, text: Path, num_tokens: int | None) -> torch.Tensor:
    directory = plan.checkpoint.directory
    wanted, at_least = (default_num_tokens(plan.widest), MIN_TOKENS) if num_tokens is None else (num_tokens, None)
    tokens = calibration_windows(directory, text, wanted, at_least)
    vocabulary = plan.checkpoint.tensors[plan.structure.head_source].shape[0]
    if tokens.max() >= vocabulary:
        raise QuantizeError(f"{directory}: its tokenizer makes token {tokens.max()} of the text, but {plan.structure.head_source} has "
                            f"{vocabulary} rows; use --calibration none")
    return tokens


def chosen_method(bpw: float, calibration: Path | None, encoder: str | None, rates: str | None,
                  calibration_tokens: int | None = None) -> tuple[str, str]:
    """Encoder and rates of a request, None replaced by the default.

    Raises:
        QuantizeError: they do not go together.
    """
    encoder = encoder or ("feedback" if calibration else "nearest")
    rates = rates or ("mixed" if calibration else "uniform")
    for option, value, known in (("encoder", encoder, ENCODERS), ("rates", rates, RATES)):
        if value not in known:
            raise QuantizeError(f"--{option} {value}: expected one of {', '.join(known)}")
        if value == known[0] and calibration is None:
            raise QuantizeError(f"--{option} {value} needs a calibration text, --calibration is none")
    if calibration_tokens is not None and calibration is None:
        raise QuantizeError(f"--calibration-tokens {calibration_tokens} needs a calibration text, --calibration is none")
    if rates == "uniform" and not index_bits_for(bpw)[1]:
        raise QuantizeError(f"--bpw {bpw:g}: uniform rates come in halves, 3, 3.5 ... 6; others need --rates mixed, "
                            "which needs a calibration text")
    return encoder, rates


def _allocate(plan: Plan, bpw: float, sensitivities: list[list[Sensitivity]]) -> Plan:
    """The plan with bits where they save most."""
    sizes = [[sum(linear.num_rows * linear.num_inputs // 2 for linear in group) for group in groups] for groups in plan.layers]
    costs = [s.distortion_cost for s in chain(*sensitivities)]
    chosen = iter(allocate(costs, [*chain(*sizes)], plan.index_bits_within(bpw)))
    return plan.with_rates([[next(chosen) for _ in groups] for groups in plan.layers])


def _write_shards(plan: Plan, output: Output, calibrator: Calibrator | None, sensitivities: list[list[Sensitivity]], encoder: str,
                  device: torch.device, progress: Progress | None) -> None:
    open_shards = [shard for shard in plan.shards if shard.file not in output.files]
    end = max((shard.layers.stop for shard in open_shards), default=0)
    head_names = {t.name for t in plan.output_tensors(plan.head)} if plan.head else set()
    if any(t.name in head_names for shard in open_shards for t in shard.tensors):
        end = len(plan.layers)
    head: dict[str, torch.Tensor] = {}
    # With calibration, layers of finished shards are still passed through, up to the last layer that is needed.
    done = 0
    for shard in plan.shards:
        wanted = shard in open_shards
        tensors: dict[str, torch.Tensor] = {}
        entries: list[dict[str, Any]] = []
        for layer in shard.layers:
            made: dict[str, torch.Tensor] = {}
            if wanted:
                weights = plan.load_layer(layer)
                importance = [s.importance for s in sensitivities[layer]] if sensitivities else [None] * len(plan.layers[layer])
                hessians = calibrator.hessians(weights, plan.layers[layer], importance) if calibrator else {}
                made, notes = _quantize_layer(plan, layer, weights, hessians, encoder, device)
                del hessians  # before the next layer makes its own
                tensors |= made
                entries += notes
            elif calibrator and layer < end:
                made = output.read_shard(shard.file, plan.layer_output_names(layer))
            if calibrator and made:
                calibrator.finish(_decoded(plan, layer, made))
            done += sum(linear.num_rows * linear.num_inputs for group in plan.layers[layer] for linear in group)
            if progress:
                progress("quantising", done, plan.num_quantized_weights)
        if wanted:
            outside = [t.name for t in shard.tensors if not shard.layers]
            if plan.head and head_names.intersection(outside):
                if not head:
                    head, notes = _quantize_head(plan, plan.head, calibrator, encoder, device)
                if f"{plan.head.name}.qweight" in outside:
                    entries += notes
            tensors |= head | dict(plan.checkpoint.load_finite(name for name in outside if name not in head_names))
            output.write_shard(shard.file, {t.name: tensors[t.name] for t in shard.tensors}, entries)


def _quantize_head(plan: Plan, head: Linear, calibrator: Calibrator | None, encoder: str,
                   device: torch.device) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The head's output tensors, and its entry in the report."""
    hessian = calibrator.head_hessian() if calibrator else None
    return _quantize_linears(plan, [head], {head.name: plan.load_head().to(device)}, {head.name: hessian}, encoder)


def _quantize_layer(plan: Plan, layer: int, weights: dict[str, torch.Tensor], hessians: dict[str, torch.Tensor | None], encoder: str,
                    device: torch.device) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The output tensors of a decoder layer from its original ones, and the report's entries."""
    entries = []
    for group in plan.layers[layer]:
        originals = {linear.name: weights.pop(f"{linear.name}.weight").to(device) for linear in group}
        made, notes = _quantize_linears(plan, group, originals, {x.name: hessians.get(x.reads) for x in group}, encoder)
        weights |= made
        entries += notes
    return weights, entries


def _quantize_linears(plan: Plan, group: Sequence[Linear], originals: dict[str, torch.Tensor], hessians: dict[str, torch.Tensor | None],
                      encoder: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The output tensors of an input group, and the report's entries."""
    index_bits = plan.format.index_bits_of(group[0].name)
    block = plan.format.rotation_block_size_of(group[0].name, group[0].num_inputs)
    encoded = encode_group(originals, index_bits, block, hessians, encoder)
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for linear in group:
        quantized = encoded.quantized[linear.name]
        stored = {suffix: getattr(quantized, suffix).cpu().clone() for suffix in LAYER_TENSORS}
        tensors |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in stored.items()}
        entries.append(report.layer_entry(linear, quantized, encoded.errors[linear.name], stored.values()))
    return tensors, entries


def _decoded(plan: Plan, layer: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that the output tensors of a decoder layer stand for."""
    weights = dict(tensors)
    for linear in (linear for group in plan.layers[layer] for linear in group):
        qweight, row_norms, input_scales = [weights.pop(f"{linear.name}.{suffix}") for suffix in LAYER_TENSORS]
        block = plan.format.rotation_block_size_of(linear.name, linear.num_inputs)
        weights[f"{linear.name}.weight"] = decode_weight(QuantizedWeight(qweight, row_norms, input_scales, block))
    return weights


def _write_rest(plan: Plan, output: Output, method: dict[str, Any]) -> dict[str, Any]:
    """Copies, report, plot, model card, and at last index, manifest and config."""
    source = plan.checkpoint
    for file in source.other_files():
        if file == MANIFEST:  # of a model that qamw dequantize wrote
            continue
        target = report.BASE_CARD if file == "README.md" else file
        output.write(target, functools.partial(shutil.copyfile, source.directory / file))
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    entries = [entry for shard in plan.shards for entry in output.notes[shard.file]]
    result = report.make_report(plan, entries, method)
    report.write_report(output, result, plan)
    config = source.config | {"quantization_config": plan.format.to_dict()}
    if plan.head:  # it has a weight of its own now
        config["tie_word_embeddings"] = False
        if "tie_word_embeddings" in config.get("text_config", {}):
            config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    output.finish(weight_map, plan.output_bytes, config)
    return result
