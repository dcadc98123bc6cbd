"""A QAM-W checkpoint, opened and validated, and the tensors of the model that it stands for."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offline_quantize.checkpoints.headers import find_modules, header_faults
from offline_quantize.errors import QuantizeError
from offline_quantize.files import CONFIG
from offline_quantize.model.checkpoint import Checkpoint
from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.errors import FormatError
from qamw_kernels.format import rates
from qamw_kernels.format.config import LAYER_TENSORS, QUANT_METHOD, QamwFormat
from qamw_kernels.format.packing import packed_shape
from qamw_kernels.format.rates import QuantizedShape
from qamw_kernels.format.weight import QuantizedWeight


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint whose headers fit its config.json, as far as the format goes.

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
        """Validate a checkpoint's config.json and the headers of its tensors.

        Raises:
            QuantizeError: not a QAM-W checkpoint, or what
                :func:`~offline_quantize.checkpoints.headers.header_faults` finds, one per line.
        """
        config_file = checkpoint.directory / CONFIG
        if not checkpoint.quantization:
            raise QuantizeError(
                f"{config_file}: no quantization_config, this is not a QAM-W checkpoint"
            )
        try:
            fmt = QamwFormat.from_dict(checkpoint.quantization)
        except FormatError as error:
            raise QuantizeError(f"{config_file}: {error}") from None
        modules = find_modules(checkpoint, fmt)
        if faults := header_faults(checkpoint, fmt, modules):
            raise QuantizeError("\n".join(faults))
        return QuantizedCheckpoint(checkpoint, fmt, modules)

    @property
    def directory(self) -> Path:
        """Where the checkpoint is."""
        return self.checkpoint.directory

    @property
    def effective_bits_per_weight(self) -> float:
        """All stored bytes of the quantized layers, codebooks included, in bits per weight."""
        return rates.effective_bits_per_weight(self.modules.values())

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
            TensorError: a value that the format does not allow, or that ``dtype`` does not hold.
        """
        module, _, suffix = stored.rpartition(".")
        if suffix != "qweight":
            return next(self.checkpoint.load_finite([stored]))[1]
        return decode_checked(self._weight(module), module, dtype)

    def check_values(self, stored: str) -> None:
        """Check one tensor of the model.

        Args:
            stored: a value of :meth:`decoded_names`.
        Raises:
            TensorError: a value that the format does not allow.
        """
        module, _, suffix = stored.rpartition(".")
        if suffix == "qweight":
            self._weight(module, planes=False).check(module)
        else:
            next(self.checkpoint.load_finite([stored]))

    def _weight(self, module: str, planes: bool = True) -> QuantizedWeight:
        """A quantized weight; checking values needs no planes, as any bits are valid indices."""
        shape = self.modules[module]
        names = [f"{module}.{suffix}" for suffix in LAYER_TENSORS if planes or suffix != "qweight"]
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in self.checkpoint.load(names)}
        if not planes:
            planes_shape = packed_shape(shape.num_rows, shape.num_inputs, shape.index_bits)
            tensors["qweight"] = torch.empty(planes_shape, dtype=torch.int32, device="meta")
        return self.format.weight_of(module, tensors)


def open_quantized(directory: Path) -> QuantizedCheckpoint:
    """Open a finished QAM-W checkpoint; only config.json and headers are read.

    Raises:
        QuantizeError: unfinished, or :meth:`QuantizedCheckpoint.of` refuses it.
    """
    return QuantizedCheckpoint.of(Checkpoint(directory))


def effective_bits_per_weight(directory: Path) -> float | None:
    """Stored bits per quantized weight, tensors and codebooks.

    Returns:
        None if the checkpoint is plain or of another method.
    Raises:
        QuantizeError: a QAM-W checkpoint that :func:`open_quantized` refuses.
    """
    checkpoint = Checkpoint(directory)
    if checkpoint.quantization.get("quant_method") != QUANT_METHOD:
        return None
    return QuantizedCheckpoint.of(checkpoint).effective_bits_per_weight


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
        Name and tensor, as in a plain checkpoint; but experts that the checkpoint stores apart are
        not stacked.
    Raises:
        QuantizeError: quantized with a method that is not decoded, or
            :meth:`QuantizedCheckpoint.of` refuses it.
        TensorError: a value of a QAM-W checkpoint that the format does not allow.
    """
    if not checkpoint.quantization or checkpoint.encoding:
        names = [name for name in checkpoint.tensors if wanted is None or name in wanted]
        yield from checkpoint.load(names)
        return
    quantized = QuantizedCheckpoint.of(checkpoint)
    for name, stored in quantized.decoded_names().items():
        if wanted is None or name in wanted:
            tensor = quantized.decoded_tensor(stored, dtype)
            yield name, tensor.T if name in quantized.format.stacks else tensor
