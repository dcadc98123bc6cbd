"""From a QAM-W checkpoint back to a plain one: the weights that it stands for, in 16 or 32 bits."""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from offline_quantize.checkpoints.quantized import QuantizedCheckpoint, open_quantized
from offline_quantize.checkpoints.verify import verify
from offline_quantize.files import BASE_CARD, CARD, PLOT, REPORT, check_space
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import TensorInfo, without_quantization
from offline_quantize.output.directory import Output
from offline_quantize.output.journal import Journal
from offline_quantize.planning.shards import MAX_SHARD_BYTES, make_shards
from offline_quantize.progress import Progress, silent
from qamw_kernels.format.manifest import MANIFEST
from qamw_kernels.format.stacks import Stack


def dequantize(
    quantized: Path,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = silent,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write the plain checkpoint that ``quantized`` stands for into the new directory ``out``.

    ``quantized`` is verified first. One shard is in memory at a time.

    Args:
        dtype: of the weights that were quantized, and what config.json names; all other tensors
            are copied as they are.
        progress: called with bytes.
    Returns:
        Bytes of all tensors written.
    Raises:
        QuantizeError: ``verify`` refuses it, ``out`` is not new or empty, or the disk is too small.
        TensorError: ``dtype`` cannot represent a weight.
    """
    verify(quantized)
    source = open_quantized(quantized)
    with Output.reserved(out, quantized, resume=False):
        return _write(source, out, dtype, progress, max_shard_bytes)


def _write(
    source: QuantizedCheckpoint,
    out: Path,
    dtype: torch.dtype,
    progress: Progress,
    max_shard_bytes: int,
) -> int:
    stacks = _stacks(source)
    infos, stored_names = _decoded_infos(source, stacks, dtype), source.decoded_names()
    source.checkpoint.other_files()  # refuses what could not be copied in the end
    total = sum(info.num_bytes for info in infos)
    check_space(out, total)
    output = Output(out, Journal({"the command": "dequantize"}), resumable=False)
    weight_map, done = {}, 0
    for shard in make_shards([], infos, max_shard_bytes):
        tensors = {}
        for info in shard.tensors:
            stack = stacks.get(info.name)
            names = stack.slices if stack else [info.name]
            values = {name: source.decoded_tensor(stored_names[name], dtype) for name in names}
            tensors[info.name] = stack.join(values) if stack else values[info.name]
            weight_map[info.name] = shard.file
            done += info.num_bytes
            progress("dequantizing", done, total)
        output.write_shard(shard.file, tensors, None)
    _copy_other_files(source, output)
    output.finish(weight_map, total, _plain_config(source, dtype), sources={})
    return total


def _stacks(source: QuantizedCheckpoint) -> dict[str, Stack]:
    """Name -> tensors whose matrices the checkpoint has apart."""
    stored = source.checkpoint.tensors
    stacks = find_structure(source.checkpoint).stacks
    return {name: stack for name, stack in stacks.items() if name not in stored}


def _decoded_infos(
    source: QuantizedCheckpoint, stacks: Mapping[str, Stack], dtype: torch.dtype
) -> list[TensorInfo]:
    """Headers of the tensors that will be written."""
    stack_of = {part: stack for stack in stacks.values() for part in stack.slices}
    infos: dict[str, TensorInfo] = {}
    for name, stored in source.decoded_names().items():
        shape = source.modules.get(name.removesuffix(".weight"))
        if stack := stack_of.get(name):
            infos[stack.name] = TensorInfo(stack.name, "", stack.shape, dtype)
        elif shape:
            infos[name] = TensorInfo(name, "", (shape.num_rows, shape.num_inputs), dtype)
        else:
            infos[name] = source.checkpoint.tensors[stored]
    return list(infos.values())


def _copy_other_files(source: QuantizedCheckpoint, output: Output) -> None:
    """Copy what holds no weights; the model's own card gets its name back, ours is left out."""
    for file in source.checkpoint.other_files():
        if file not in (MANIFEST, REPORT, PLOT, CARD):
            target = CARD if file == BASE_CARD else file
            output.write(target, functools.partial(shutil.copyfile, source.directory / file))


def _plain_config(source: QuantizedCheckpoint, dtype: torch.dtype) -> dict[str, object]:
    config = without_quantization(source.checkpoint.config)
    config.pop("torch_dtype", None)
    return config | {"dtype": str(dtype).removeprefix("torch.")}
