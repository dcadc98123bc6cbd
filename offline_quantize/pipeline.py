"""The offline quantizer: from a Hugging Face checkpoint to a checkpoint that vLLM serves.

How a weight passes through: :mod:`.planning` decides, from headers alone, what becomes of it.
With mixed rates, :mod:`.calibration` measures what its errors cost, and the plan gives it a rate.
Then its decoder layer is loaded, calibrated, encoded by :mod:`.encoding`, and written to a shard by
:mod:`.output`.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch

from offline_quantize.calibration.hessians import Calibrator
from offline_quantize.calibration.sensitivity import (
    Sensitivity,
    from_state,
    measure_sensitivities,
    to_state,
)
from offline_quantize.decisions import Decisions, decide
from offline_quantize.devices import usable_device
from offline_quantize.encoding.group import encode_group
from offline_quantize.errors import Option, QuantizeError
from offline_quantize.files import STATE, existing_parent
from offline_quantize.model.runner import DTYPE
from offline_quantize.model.structure import DecoderLayer, Linear
from offline_quantize.output.directory import Output
from offline_quantize.output.journal import Journal
from offline_quantize.output.other_files import write_other_files
from offline_quantize.output.report import LayerReport, Report
from offline_quantize.planning.allocation import allocate
from offline_quantize.planning.plan import Plan
from offline_quantize.planning.request import DEFAULT_REQUEST, QuantizeRequest
from offline_quantize.planning.shards import Shard
from offline_quantize.planning.sizes import explained_memory_errors
from offline_quantize.progress import Progress, silent
from offline_quantize.ranks import ALONE, Ranks
from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.format.config import LAYER_TENSORS

logger = logging.getLogger(__name__)


@dataclass
class Quantized:
    """What becomes of one or several layers.

    Attributes:
        tensors: everything that is written for them, by name.
        reports: of the linears that were quantized.
    """

    tensors: dict[str, torch.Tensor]
    reports: list[LayerReport]


@dataclass(frozen=True)
class Run:
    """What the steps of one run share.

    Attributes:
        output: None in all processes but the first.
        finished: the shards that a run before this one finished.
        sensitivities: of every input group of every layer; empty with uniform rates.
        calibrator: None without calibration, or where every shard is finished already.
        ranks: the processes that carry out the run.
    """

    plan: Plan
    output: Output | None
    finished: frozenset[str]
    device: torch.device
    sensitivities: Sequence[Sequence[Sensitivity]]
    calibrator: Calibrator | None
    ranks: Ranks


def quantize(
    model: Path | str,
    out: Path | str,
    request: QuantizeRequest = DEFAULT_REQUEST,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Report:
    """Quantize the checkpoint directory ``model`` into the new directory ``out``.

    In memory are one decoder layer, one output shard and, with calibration, the hidden states of
    the calibration tokens and the Hessians of a layer.

    Args:
        device: "auto", "cpu" or "cuda".
        resume: continue an interrupted run of the same request.
        progress: the stages are "hashing", "sensitivity" and "quantizing"; called in the first
            process alone.
        ranks: the processes that carry this out together, all called with the same arguments.
    Returns:
        The report, as written to qamw_report.json.
    Raises:
        QuantizeError: before any work, if the request cannot be carried out or another run writes
            ``out``; later, if the model's files change or the result cannot be written.
        TensorError: a tensor is not finite; known when it is read.
    """
    model, out = Path(model), Path(out)
    if ranks.count > 1 and device.startswith("cuda:"):
        message = ": each of several processes has its own GPU, expected auto, cpu or cuda"
        raise QuantizeError(Option("device", device), message)
    torch_device = usable_device(device, ranks.local)
    if ranks.decide(lambda: torch_device.type) != torch_device.type:
        raise QuantizeError(Option("device", device), ": the processes have devices of two kinds")
    reserved: AbstractContextManager[Journal | None] = nullcontext()
    if ranks.first:
        reserved = Output.reserved(out, model, resume)
    else:
        progress = silent
    with reserved as unfinished:
        begin = functools.partial(decide, model, out, request, torch_device, unfinished)
        decisions = ranks.decide(lambda: begin(ranks.count, progress))
        with explained_memory_errors(decisions.plan, decisions.num_tokens, out, ranks.count):
            return _run(decisions, torch_device, out, unfinished, progress, ranks)


def _run(
    decisions: Decisions,
    device: torch.device,
    out: Path,
    unfinished: Journal | None,
    progress: Progress,
    ranks: Ranks,
) -> Report:
    """The work itself, after all checks."""
    plan, tokens = decisions.plan, decisions.tokens
    sensitivities: list[list[Sensitivity]] = []
    if tokens is not None and plan.request.mixed:
        sensitivities = ranks.decide(lambda: _kept_sensitivities(plan, out, unfinished))
        if not sensitivities:
            checkpoint, scratch = plan.checkpoint, existing_parent(out)
            measured = measure_sensitivities(
                checkpoint, plan.layers, tokens, device, scratch, progress, ranks=ranks
            )
            sensitivities = ranks.decide(lambda: measured)
        plan = _allocate(plan, sensitivities)
    output = None
    if ranks.first:
        output = Output(out, decisions.journal, to_state(sensitivities), unfinished)
    finished = ranks.decide(lambda: frozenset(output.journal.files if output else ()))
    calibrator = None
    if tokens is not None and any(shard.file not in finished for shard in plan.shards):
        calibrator = Calibrator(plan.checkpoint, tokens, device, ranks=ranks)
    _write_shards(Run(plan, output, finished, device, sensitivities, calibrator, ranks), progress)

    def finish() -> Report:
        assert output
        return write_other_files(plan, output, decisions.num_tokens)

    return ranks.decide(finish)


def _kept_sensitivities(
    plan: Plan, out: Path, unfinished: Journal | None
) -> list[list[Sensitivity]]:
    """What the interrupted run measured; empty if there was no such run, or its file is lost."""
    state = unfinished.read_state(out) if unfinished else {}
    if state is None:
        logger.warning("%s is damaged: sensitivities are measured again", out / STATE)
    return from_state(state or {}, len(plan.layers))


def _allocate(plan: Plan, sensitivities: Sequence[Sequence[Sensitivity]]) -> Plan:
    """The plan with bits where they save most."""
    pairs = [group.num_weights // 2 for layer in plan.layers for group in layer.groups]
    costs = [sensitivity.distortion_cost for sensitivity in chain(*sensitivities)]
    chosen = iter(allocate(costs, pairs, plan.index_bit_budget))
    return plan.with_rates([list(islice(chosen, len(layer.groups))) for layer in plan.layers])


def _write_shards(run: Run, progress: Progress) -> None:
    """Write every shard that is not finished yet."""
    layers = _quantized_layers(run, progress)
    quantized_head = functools.cache(lambda: _quantize_head(run))  # may be in several shards
    for shard in run.plan.shards:
        _write_shard(run, shard, layers, quantized_head)


def _write_shard(
    run: Run, shard: Shard, layers: Iterator[Quantized], quantized_head: Callable[[], Quantized]
) -> None:
    """Take a shard's layers from ``layers``, and write the shard unless it is finished."""
    content = _join(islice(layers, len(shard.layers)))
    if shard.file in run.finished:
        return
    if not shard.layers:
        content = _outside_layers(run, shard, quantized_head)
    if not run.output:
        return
    tensors = {info.name: content.tensors[info.name] for info in shard.tensors}
    run.output.write_shard(shard.file, tensors, [report.to_dict() for report in content.reports])


def _quantized_layers(run: Run, progress: Progress) -> Iterator[Quantized]:
    """Every decoder layer in turn; empty where its shard is finished.

    With calibration, layers of finished shards are read again, up to the last one that is needed:
    the calibration tokens pass through all layers before it.
    """
    num_needed, done = _num_needed_layers(run), 0
    for shard in run.plan.shards:
        for index in shard.layers:
            layer, quantized = run.plan.layers[index], Quantized({}, [])
            if shard.file not in run.finished:
                quantized = _quantize_layer(run, layer)
                _pass_tokens(run, layer, quantized.tensors)
            elif run.calibrator and index < num_needed:
                _pass_tokens(run, layer, _read_layer(run, shard, layer))
            done += layer.num_weights
            progress("quantizing", done, run.plan.num_quantized_weights)
            yield quantized if run.output else Quantized({}, [])  # the first process writes
            del quantized  # before the next layer is loaded


def _num_needed_layers(run: Run) -> int:
    """How many decoder layers the calibration tokens have to pass through."""
    plan = run.plan
    unfinished = [shard for shard in plan.shards if shard.file not in run.finished]
    written = {info.name for shard in unfinished for info in shard.tensors}
    if not written.isdisjoint(_head_names(plan)):
        return len(plan.layers)
    return max((shard.layers.stop for shard in unfinished), default=0)


def _quantize_layer(run: Run, layer: DecoderLayer) -> Quantized:
    """Calibrate and encode one decoder layer; what is not quantized stays as it is."""
    weights = layer.load(run.plan.checkpoint)
    hessians: Mapping[str, torch.Tensor | None] = {}
    if run.calibrator:
        importance: list[torch.Tensor | None] = [None] * len(layer.groups)
        if run.sensitivities:
            importance = [s.importance for s in run.sensitivities[layer.index]]
        hessians = run.calibrator.hessians(weights, layer, importance)
    reports = []
    for group in layer.groups:
        originals = {x.name: weights.pop(x.weight_name).to(run.device) for x in group}
        quantized = _quantize_linears(run, list(group), originals, hessians)
        weights |= quantized.tensors
        reports += quantized.reports
    return Quantized(weights, reports)


def _quantize_head(run: Run) -> Quantized:
    """Calibrate and encode the head; all layers must be finished."""
    head = run.plan.head
    assert head is not None
    hessian = run.calibrator.head_hessian() if run.calibrator else None
    originals = {head.name: run.plan.load_head().to(run.device)}
    return _quantize_linears(run, [head], originals, {head.reads: hessian})


def _quantize_linears(
    run: Run,
    linears: Sequence[Linear],
    originals: dict[str, torch.Tensor],
    hessians: Mapping[str, torch.Tensor | None],
) -> Quantized:
    """Encode the linears of one input group.

    Args:
        originals: name -> weight [N, K].
        hessians: :attr:`Linear.reads` -> [K, K] float32, None where no token reached it.
    """
    plan, name, num_inputs = run.plan, linears[0].name, linears[0].num_inputs
    encoded = encode_group(
        originals,
        plan.format.index_bits_of(name),
        plan.format.rotation_block_size_of(name, num_inputs),
        {linear.name: hessians.get(linear.reads) for linear in linears},
        plan.request.encoder,
        plan.request.balance_scales,
        run.ranks,
        plan.format.code,
    )
    result = Quantized({}, [])
    for linear in linears:
        quantized = encoded.quantized[linear.name]
        for suffix, tensor in quantized.tensors().items():
            result.tensors[f"{linear.name}.{suffix}"] = tensor.clone()  # linears share their scales
        errors = encoded.errors[linear.name]
        result.reports.append(LayerReport.of(linear, quantized, errors))
    return result


def _read_layer(run: Run, shard: Shard, layer: DecoderLayer) -> dict[str, torch.Tensor]:
    """The tensors of a layer from its finished shard."""
    names = [info.name for info in run.plan.written(layer.tensors)]
    return run.ranks.decide(lambda: run.output.read_shard(shard.file, names) if run.output else {})


def _pass_tokens(run: Run, layer: DecoderLayer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Carry the calibration tokens through a layer as its output ``tensors`` represent it."""
    if run.calibrator:
        run.calibrator.finish(layer, _decoded(run.plan, layer, tensors, run.device))


def _outside_layers(run: Run, shard: Shard, quantized_head: Callable[[], Quantized]) -> Quantized:
    """The content of a shard without decoder layers: embeddings, norms, the head."""
    names, head_names = [info.name for info in shard.tensors], _head_names(run.plan)
    content = Quantized({}, [])
    if not set(head_names).isdisjoint(names):
        head = quantized_head()
        content.tensors |= head.tensors
        if head_names[0] in names:  # it is reported once
            content.reports += head.reports
    if run.ranks.first:
        others = [name for name in names if name not in head_names]
        content.tensors |= run.plan.checkpoint.load_finite(others)
    return content


def _head_names(plan: Plan) -> list[str]:
    """Names of the tensors that are written for a quantized head."""
    return [info.name for info in plan.output_tensors(plan.head)] if plan.head else []


def _join(layers: Iterable[Quantized]) -> Quantized:
    result = Quantized({}, [])
    for layer in layers:
        result.tensors |= layer.tensors
        result.reports += layer.reports
    return result


def _decoded(
    plan: Plan, layer: DecoderLayer, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """The weights that a decoder layer's output tensors stand for; decoded ones are in DTYPE."""
    weights = dict(tensors)
    for linear in layer.linears():
        stored = {x: weights.pop(f"{linear.name}.{x}").to(device) for x in LAYER_TENSORS}
        decoded = decode_weight(plan.format.weight_of(linear.name, stored))
        weights[linear.weight_name] = decoded.to(DTYPE)
    return weights
