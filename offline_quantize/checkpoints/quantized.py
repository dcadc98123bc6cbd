"""A QAM-W checkpoint, opened and validated, and the tensors of the model that it stands for."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offline_quantize.errors import Option, QuantizeError
from offline_quantize.files import CONFIG, PROGRESS
from offline_quantize.model.checkpoint import Checkpoint
from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.errors import FormatError
from qamw_kernels.files import read_json
from qamw_kernels.format import rates
from qamw_kernels.format.config import LAYER_TENSORS, QUANT_METHOD, QamwFormat, layer_tensors
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.format.rates import QuantizedShape
from qamw_kernels.format.weight import QuantizedWeight


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint whose headers show a complete set of tensors for every quantized layer.

    Attributes:
        checkpoint: its directory, config.json and headers.
        format: the ``quantization_config`` of config.json.
        modules: module name -> shape and rate, of every quantized linear layer.
    """

    checkpoint: Checkpoint
    format: QamwFormat
    modules: dict[str, QuantizedShape]

    @staticmethod
    def of(checkpoint: Checkpoint) -> "QuantizedCheckpoint":
        """Validate a checkpoint's config.json and the names of its tensors.

        Raises:
            QuantizeError: not a QAM-W checkpoint, or a tensor of a quantized layer is missing.
        """
        config_file = checkpoint.directory / CONFIG
        if not checkpoint.config.get("quantization_config"):
            raise QuantizeError(
                f"{config_file}: no quantization_config, this is not a QAM-W checkpoint"
            )
        try:
            fmt = QamwFormat.from_dict(checkpoint.config["quantization_config"])
        except FormatError as error:
            raise QuantizeError(f"{config_file}: {error}") from None
        modules = _find_modules(checkpoint, fmt)
        _check_complete(checkpoint, modules)
        return QuantizedCheckpoint(checkpoint, fmt, modules)

    @property
    def directory(self) -> Path:
        """Where the checkpoint is."""
        return self.checkpoint.directory

    @property
    def effective_bits_per_weight(self) -> float:
        """All stored bytes of the quantized layers, codebooks included, in bits per weight."""
        return rates.effective_bits_per_weight(self.modules.values())

    def header_faults(self, module: str) -> list[str]:
        """Tensors of a quantized layer that have another shape or dtype than the format asks for.

        Returns:
            One line for each: its file, its name, what it is and what it should be.
        """
        faults = []
        layer = self.modules[module]
        expected = layer_tensors(layer.num_rows, layer.num_inputs, layer.index_bits)
        for suffix, (shape, dtype) in expected.items():
            info = self.checkpoint.tensors[f"{module}.{suffix}"]
            if (info.shape, info.dtype) != (shape, dtype):
                faults.append(
                    f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}, "
                    f"expected {dtype} {list(shape)}"
                )
        return faults

    def decoded_names(self) -> dict[str, str]:
        """Name of every tensor of the model -> name of the stored tensor that holds it.

        A quantized weight is held by ``<module>.qweight``; any other tensor by itself.
        """
        names = {}
        for name in self.checkpoint.tensors:
            module, _, suffix = name.rpartition(".")
            if suffix == "qweight":
                names[f"{module}.weight"] = name
            elif suffix not in LAYER_TENSORS:
                names[name] = name
        return names

    def decoded_tensor(self, stored: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor of the model.

        Args:
            stored: a value of :meth:`decoded_names`.
            dtype: of a weight that was quantized, [N, K]; any other tensor stays as it is stored.
        Raises:
            QuantizeError: :meth:`header_faults` of the layer, one per line.
            TensorError: a value that the format does not allow, or that ``dtype`` does not hold.
        """
        module, _, suffix = stored.rpartition(".")
        if suffix != "qweight":
            return next(self.checkpoint.load_finite([stored]))[1]
        if faults := self.header_faults(module):
            raise QuantizeError("\n".join(faults))
        names = [f"{module}.{suffix}" for suffix in LAYER_TENSORS]
        qweight, row_norms, input_scales = (tensor for _, tensor in self.checkpoint.load(names))
        block_size = self.format.rotation_block_size_of(module, len(input_scales))
        weight = QuantizedWeight(qweight, row_norms, input_scales, block_size)
        return decode_checked(weight, module, dtype)


def check_finished(directory: Path) -> None:
    """Raise QuantizeError if ``directory`` is what an interrupted run left."""
    if (directory / PROGRESS).is_file():
        raise QuantizeError(
            f"{directory}: unfinished: qamw quantize continues with ",
            Option("resume", True),
            ", qamw dequantize only in a new directory",
        )


def open_quantized(directory: Path) -> QuantizedCheckpoint:
    """Open a finished QAM-W checkpoint; only config.json and headers are read.

    Raises:
        QuantizeError: not a QAM-W checkpoint, unfinished, or a tensor is missing.
    """
    check_finished(directory)
    return QuantizedCheckpoint.of(Checkpoint(directory))


def effective_bits_per_weight(directory: Path) -> float | None:
    """Stored bits per quantized weight, tensors and codebooks.

    Returns:
        None if the checkpoint is plain or of another method.
    Raises:
        QuantizeError: a QAM-W checkpoint that :func:`open_quantized` refuses.
    """
    quantization = read_json(directory / CONFIG).get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        return None
    return open_quantized(directory).effective_bits_per_weight


def decoded_tensors(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    wanted: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the model that a plain or QAM-W checkpoint stands for, one after the other.

    Args:
        dtype: what quantized weights are rounded to; other tensors stay as they are stored.
        wanted: names of tensors of the model; names that it does not have are left out.
            None for all tensors.
    Yields:
        Name and tensor.
    Raises:
        QuantizeError: quantized with another method, or a tensor is missing.
    """
    if not checkpoint.config.get("quantization_config"):
        names = [name for name in checkpoint.tensors if wanted is None or name in wanted]
        yield from checkpoint.load(names)
        return
    quantized = QuantizedCheckpoint.of(checkpoint)
    for name, stored in quantized.decoded_names().items():
        if wanted is None or name in wanted:
            yield name, quantized.decoded_tensor(stored, dtype)


def _find_modules(checkpoint: Checkpoint, fmt: QamwFormat) -> dict[str, QuantizedShape]:
    """Shape and rate of every module that has a ``qweight``."""
    modules = {}
    for name, info in checkpoint.tensors.items():
        if not name.endswith(".qweight"):
            continue
        if len(info.shape) != 3 or 0 in info.shape:
            raise QuantizeError(
                f"{info.file}: {name} has shape {list(info.shape)}, "
                f"expected [index_bits, N, K / {UNIT_INPUTS}]"
            )
        module = name.removesuffix(".qweight")
        num_rows, num_inputs = info.shape[1], info.shape[2] * UNIT_INPUTS
        modules[module] = QuantizedShape(num_rows, num_inputs, fmt.index_bits_of(module))
    if not modules:
        raise QuantizeError(f"{checkpoint.directory}: no quantized layer found")
    return modules


def _check_complete(checkpoint: Checkpoint, modules: Collection[str]) -> None:
    for name in modules:
        for suffix in LAYER_TENSORS:
            if f"{name}.{suffix}" not in checkpoint.tensors:
                raise QuantizeError(f"{checkpoint.directory}: {name}.{suffix} is missing")
