"""QAM-W checkpoints in transformers::

    import qamw_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(CKPT)

On the CPU weights are decoded while loading and the layers become plain ones, as in vLLM; on a GPU
they stay packed and the kernels run.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.errors import TensorError
from qamw_kernels.format.config import (
    QUANT_METHOD,
    QamwFormat,
    layer_tensors,
)
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.linear import linear as quantized_linear
from qamw_kernels.ops.weight import TiledWeight

# As safetensors spells those of the format.
_DTYPES = {torch.int32: "I32", torch.float32: "F32", torch.float16: "F16"}


@register_quantization_config(QUANT_METHOD)
class QamwTransformersConfig(QuantizationConfigMixin):
    """A :class:`QamwFormat` as transformers wants it.

    Raises:
        FormatError: an invalid, incomplete or unknown format.
    """

    def __init__(self, **config: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # its type lists other methods
        self.format = QamwFormat.from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        return self.format.to_dict()


class QamwLinear(nn.Module):
    """A linear layer whose weight [N, K] is quantized.

    Its buffers are the tensors of kernels/FORMAT.md until :meth:`pack` has run, then those of a
    :class:`TiledWeight`.
    """

    qweight: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    tiles: torch.Tensor
    quadrant_words: torch.Tensor

    def __init__(self, linear: nn.Linear, index_bits: int, rotation_block_size: int) -> None:
        super().__init__()
        self.rotation_block_size = rotation_block_size
        tensors = layer_tensors(linear.out_features, linear.in_features, index_bits)
        for name, (shape, dtype) in tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = linear.bias
        # No parameter, and without memory: code of models that initializes weights wants to see
        # one. It leaves alone what has this mark of transformers.
        self.weight = torch.empty_like(linear.weight, device="meta")
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def pack(self, name: str) -> None:
        """Bring the weight into the form that kernels read.

        Args:
            name: of the module, for errors.
        Raises:
            TensorError: see :meth:`QuantizedWeight.check`.
        """
        quantized = self._quantized()
        quantized.check(name)
        weight = TiledWeight.of(quantized)
        self.register_buffer("tiles", weight.tiles)
        self.register_buffer("quadrant_words", weight.quadrant_words)
        del self.qweight

    def plain(self, name: str, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weight decoded.

        Args:
            name: of the module, for errors.
        Raises:
            TensorError: see :func:`decode_checked`.
        """
        quantized = self._quantized()
        num_rows, num_inputs = quantized.shape
        linear = nn.Linear(num_inputs, num_rows, self.bias is not None, device="meta")
        weight = decode_checked(quantized, name, dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = TiledWeight(
            self.tiles,
            self.row_norms,
            self.input_scales,
            self.quadrant_words,
            self.rotation_block_size,
        )
        return quantized_linear(x, weight, self.bias)

    def _quantized(self) -> QuantizedWeight:
        return QuantizedWeight(
            self.qweight,
            self.row_norms,
            self.input_scales,
            self.rotation_block_size,
        )


@register_quantizer(QUANT_METHOD)
class QamwHfQuantizer(HfQuantizer):
    """Loads QAM-W checkpoints; it makes none: that is what ``qamw quantize`` is for."""

    requires_calibration = True
    quantization_config: QamwTransformersConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Put a :class:`QamwLinear` in the place of every quantized layer.

        Raises:
            TensorError: a tensor is missing, and transformers itself would go on with random
                numbers; it has another shape or dtype; or it is there twice.
        """
        fmt, stored = self.quantization_config.format, _stored_tensors(kwargs["checkpoint_files"])
        names = _names_in_checkpoint(model, stored)
        for name, module in list(model.named_modules()):
            full = names.get(name, name)
            if not isinstance(module, nn.Linear) or full in fmt.ignore:
                continue
            layer = QamwLinear(
                module,
                fmt.index_bits_of(full),
                fmt.rotation_block_size_of(full, module.in_features),
            )
            _check_stored(stored, full, dict(layer.named_buffers()))
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, QamwLinear):
                if module.qweight.device.type == "cpu":
                    model.set_submodule(name, module.plain(name, model.dtype))
                else:
                    module.pack(name)
        return model

    def is_serializable(self) -> bool:
        return False  # what is in memory is not what is on disk; the checkpoint is there already

    @property
    def is_trainable(self) -> bool:
        return False


def _stored_tensors(files: Iterable[str]) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype, as safetensors spells it, of the tensors in the files of a checkpoint."""
    stored: dict[str, tuple[list[int], str]] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if name in stored:
                    raise TensorError(f"{file}: {name} is also in another file of the checkpoint")
                entry = shard.get_slice(name)
                stored[name] = entry.get_shape(), entry.get_dtype()
    return stored


def _check_stored(
    stored: Mapping[str, tuple[list[int], str]], module: str, expected: Mapping[str, torch.Tensor]
) -> None:
    """Whether the tensors of a module are there, in the shapes and dtypes of the format."""
    if missing := [f"{module}.{name}" for name in expected if f"{module}.{name}" not in stored]:
        raise TensorError(f"the checkpoint lacks {', '.join(missing)}")
    for name, tensor in expected.items():
        found, wanted = stored[f"{module}.{name}"], (list(tensor.shape), _DTYPES[tensor.dtype])
        if found != wanted:
            raise TensorError(
                f"{module}.{name} is {found[1]} {found[0]}, expected {wanted[1]} {wanted[0]}"
            )


def _names_in_checkpoint(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Module of the model -> its name in the checkpoint, of all that have a matrix there.

    Raises:
        TensorError: a matrix is quantized that transformers does not load as it is.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    shapes, names = model.state_dict(), {}
    for name in stored:
        module, _, suffix = name.rpartition(".")
        if suffix not in ("qweight", "weight"):
            continue
        prefix, weight = model.base_model_prefix, f"{module}.weight"
        renamed, merged = rename_source_key(weight, renamings, converters, prefix, shapes)
        if suffix == "qweight" and merged:
            raise TensorError(
                f"{name}: transformers merges or splits it while loading, which a packed one "
                "cannot be; use qamw dequantize, or vLLM"
            )
        names[renamed.removesuffix(".weight")] = module
    return names
