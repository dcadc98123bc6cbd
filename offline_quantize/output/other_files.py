"""What a quantized checkpoint has besides its shards."""

import functools
import logging
import os
import shutil
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from offline_quantize.errors import QuantizeError
from offline_quantize.files import (
    BASE_CARD,
    CARD,
    CONFIG,
    PLOT,
    REPORT,
    existing_parent,
    json_bytes,
)
from offline_quantize.model.checkpoint import without_quantization
from offline_quantize.model.tied import any_differ
from offline_quantize.output.card import model_card
from offline_quantize.output.directory import Output
from offline_quantize.output.report import LayerReport, Report, plot
from offline_quantize.planning.plan import Plan
from qamw_kernels.format.index import INDEX
from qamw_kernels.format.manifest import MANIFEST

logger = logging.getLogger(__name__)


def check_copies(plan: Plan, out: Path) -> None:
    """Refuse, before any work, files of the model that could not be copied into ``out``.

    Raises:
        QuantizeError: a folder has the name of a file that will be written, or a name is too long.
    """
    written = {CONFIG, INDEX, MANIFEST, REPORT, PLOT, CARD, BASE_CARD}
    written |= {shard.file for shard in plan.shards}
    others = plan.checkpoint.other_files()
    for file in others:
        if file in (REPORT, PLOT) or (file == BASE_CARD and CARD in others):
            logger.warning(
                "%s is not copied: a file of the result has this name",
                plan.checkpoint.directory / file,
            )
    parent = existing_parent(out)
    longest = {kind: os.pathconf(parent, kind) for kind in ("PC_NAME_MAX", "PC_PATH_MAX")}
    for file in others:
        path, parts = plan.checkpoint.directory / file, Path(file).parts
        if len(parts) > 1 and parts[0] in written:
            raise QuantizeError(
                f"{path.parents[len(parts) - 2]}: a folder with the name of a file that will be "
                "written; rename or remove it"
            )
        name_bytes = max(len(os.fsencode(part)) for part in parts)
        path_bytes = len(os.fsencode(out.absolute() / file))
        if name_bytes > longest["PC_NAME_MAX"] or path_bytes >= longest["PC_PATH_MAX"]:
            raise QuantizeError(f"{path}: a name too long for the disk of {out}; rename it")


def write_other_files(plan: Plan, output: Output, num_tokens: int) -> Report:
    """Write everything besides the shards, and finish the output.

    These are the model's other files, report, plot, model card, and at last index, manifest and
    config.json.

    Args:
        output: with every shard finished; the notes of its journal are the shards' layer reports.
        num_tokens: calibration tokens that were read.
    """
    source = plan.checkpoint
    others = source.other_files()
    for file in others:
        # The manifest is that of a model that was dequantized.
        if file in (MANIFEST, REPORT, PLOT) or (file == BASE_CARD and CARD in others):
            continue
        target = BASE_CARD if file == CARD else file
        output.write(target, functools.partial(shutil.copyfile, source.directory / file))
    report = _make_report(plan, output, num_tokens)
    output.write_bytes(REPORT, json_bytes(report.to_dict()))
    output.write(PLOT, lambda path: plot(path, report))
    output.write_bytes(CARD, model_card(plan, report).encode())
    weight_map = {info.name: shard.file for shard in plan.shards for info in shard.tensors}
    source.sources.check_all()  # a result made of two models is not finished
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
        code=plan.format.code,
        rates=plan.request.rates,
        nominal_bits_per_weight=plan.nominal_bits_per_weight,
        effective_bits_per_weight=plan.effective_bits_per_weight,
        quantized_weights=plan.num_quantized_weights,
        source_bytes=plan.checkpoint.source_bytes,
        source_encoding=plan.checkpoint.encoding,
        output_bytes=plan.output_bytes,
        tensor_parallel_sizes=plan.tensor_parallel_sizes,
        layers=tuple(map(LayerReport.from_dict, entries)),
    )


def _output_config(plan: Plan) -> dict[str, Any]:
    """The content of config.json."""
    config = without_quantization(plan.checkpoint.config)
    config["quantization_config"] = plan.format.to_dict()
    if plan.head or any_differ(plan.checkpoint, plan.structure.stored_twice):
        config["tie_word_embeddings"] = False  # the head has a weight of its own
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    return config
