"""From a QAM-W checkpoint back to a plain one: the weights that it stands for, in 16 or 32 bits."""

import functools
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

from offline_quantize.model.checkpoint import Checkpoint, TensorInfo
from offline_quantize.errors import QuantizeError
from offline_quantize.checkpoints.verify import open_quantized
from offline_quantize.output.directory import MANIFEST, Output
from offline_quantize.planning.plan import MAX_SHARD_BYTES, existing_parent, make_shards
from offline_quantize.output.report import BASE_CARD, PLOT, REPORT
from qamw_kernels.codec.encode import QuantizedWeight, decode_weight
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat


def decoded_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Name of every tensor of the model that a QAM-W checkpoint stands for -> the stored tensor that says so."""
    names = {}
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            names[f"{module}.weight"] = name
        elif suffix not in LAYER_TENSORS:
            names[name] = name
    return names


def decoded_tensor(checkpoint: Checkpoint, fmt: QamwFormat, stored: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of :func:`decoded_names` by its stored name: a quantised weight in ``dtype``, any other as it is."""
    module, _, suffix = stored.rpartition(".")
    if suffix != "qweight":
        return next(checkpoint.load([stored]))[1]
    qweight, row_norms, input_scales = (t for _, t in checkpoint.load(f"{module}.{s}" for s in LAYER_TENSORS))
    block = fmt.rotation_block_size_of(module, len(input_scales))
    return decode_weight(QuantizedWeight(qweight, row_norms, input_scales, block)).to(dtype)


def decoded_tensors(checkpoint: Checkpoint, dtype: torch.dtype,
                    wanted: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the model that a checkpoint stands for, all or those ``wanted``; weights of a QAM-W checkpoint rounded to ``dtype``."""
    quantized = checkpoint.config.get("quantization_config")
    if not quantized:
        yield from checkpoint.load(name for name in checkpoint.tensors if wanted is None or name in wanted)
        return
    fmt = QamwFormat.from_dict(quantized)
    for name, stored in decoded_names(checkpoint).items():
        if wanted is None or name in wanted:
            yield name, decoded_tensor(checkpoint, fmt, stored, dtype)


def dequantize(quantized: Path, out: Path, dtype: torch.dtype = torch.bfloat16, progress: Callable[[int, int], None] | None = None,
               max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Write the plain checkpoint that ``quantized`` stands for into the new directory ``out``; one shard is in memory at a time.

    Args:
        dtype: of the weights that were quantised, and what config.json says; all other tensors are copied as they are.
    Returns:
        Bytes of all tensors written.
    Raises:
        QuantizeError: not a finished QAM-W checkpoint, ``out`` is not new or empty, or the disk is too small.
    """
    checkpoint, fmt, modules = open_quantized(quantized)
    Output.check_target(out, quantized, resume=False)
    infos, stored_as = [], decoded_names(checkpoint)
    for name, stored in stored_as.items():
        shape = modules.get(name.removesuffix(".weight"))
        infos.append(TensorInfo(name, "", shape, dtype) if shape else checkpoint.tensors[stored])
    total = sum(info.num_bytes for info in infos)
    free = shutil.disk_usage(existing_parent(out)).free
    if free < total:
        raise QuantizeError(f"{out}: {total / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on its disk")
    output, weight_map, done = Output(out, "dequantize", resume=False), {}, 0
    for shard in make_shards([], infos, max_shard_bytes):
        tensors = {}
        for info in shard.tensors:
            tensors[info.name] = decoded_tensor(checkpoint, fmt, stored_as[info.name], dtype)
            weight_map[info.name] = shard.file
            done += info.num_bytes
            if progress:
                progress(done, total)
        output.write_shard(shard.file, tensors, None)
    for file in checkpoint.other_files():
        if file not in (MANIFEST, REPORT, PLOT, "README.md"):
            output.write("README.md" if file == BASE_CARD else file, functools.partial(shutil.copyfile, quantized / file))
    config = {key: value for key, value in checkpoint.config.items() if key not in ("quantization_config", "torch_dtype")}
    output.finish(weight_map, total, config | {"dtype": str(dtype).removeprefix("torch.")})
    return total
