"""What a quantized checkpoint has besides its shards."""

import functools
import shutil
from importlib.metadata import version
from itertools import chain
from typing import Any

from offline_quantize.files import BASE_CARD, CARD, CONFIG, PLOT, REPORT, json_bytes
from offline_quantize.output.card import model_card
from offline_quantize.output.directory import Output
from offline_quantize.output.report import LayerReport, Report, plot
from offline_quantize.planning.plan import Plan
from qamw_kernels.format.manifest import MANIFEST


def write_other_files(plan: Plan, output: Output, num_tokens: int) -> Report:
    """Write everything besides the shards, and finish the output.

    These are the model's other files, report, plot, model card, and at last index, manifest and
    config.json.

    Args:
        output: with every shard finished; the notes of its journal are the shards' layer reports.
        num_tokens: calibration tokens that were read.
    """
    source = plan.checkpoint
    for file in source.other_files():
        if file == MANIFEST:  # of a model that was dequantized
            continue
        target = BASE_CARD if file == CARD else file
        output.write(target, functools.partial(shutil.copyfile, source.directory / file))
    report = _make_report(plan, output, num_tokens)
    output.write_bytes(REPORT, json_bytes(report.to_dict()))
    output.write(PLOT, lambda path: plot(path, report))
    output.write_bytes(CARD, model_card(plan, report).encode())
    weight_map = {info.name: shard.file for shard in plan.shards for info in shard.tensors}
    source.sources.check_all()  # nothing is finished that was made of two models
    shards = {info.file for info in source.tensors.values()}
    sources = {file: source.sources.entry(file) for file in (CONFIG, *shards)}
    output.finish(weight_map, plan.output_bytes, _output_config(plan), sources)
    return report


def _make_report(plan: Plan, output: Output, num_tokens: int) -> Report:
    entries = chain.from_iterable(output.journal.notes[shard.file] for shard in plan.shards)
    return Report(
        qamw_version=version("qamw-vllm"),
        calibration=plan.request.calibration_name,
        calibration_tokens=num_tokens,
        encoder=plan.request.encoder,
        rates=plan.request.rates,
        nominal_bits_per_weight=plan.nominal_bits_per_weight,
        effective_bits_per_weight=plan.effective_bits_per_weight,
        quantized_weights=plan.num_quantized_weights,
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        tensor_parallel_sizes=plan.tensor_parallel_sizes,
        layers=tuple(map(LayerReport.from_dict, entries)),
    )


def _output_config(plan: Plan) -> dict[str, Any]:
    """The content of config.json."""
    config = plan.checkpoint.config | {"quantization_config": plan.format.to_dict()}
    if plan.head:  # it has a weight of its own now
        config["tie_word_embeddings"] = False
        if "tie_word_embeddings" in config.get("text_config", {}):
            config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    return config
