"""QAM-W checkpoints in transformers::

    import qamw_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(CKPT)

On the CPU weights are decoded while loading and the layers become plain ones, as in vLLM; on a GPU
linear layers stay packed and the kernels run. Matrices that transformers merges or splits while
loading, such as those of experts, are decoded on a GPU too, and take the memory of 16 bits.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.format.config import QUANT_METHOD, QamwFormat, layer_tensors
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.integrations.conversion import (
    DecodingConverter,
    expert_converters,
    takes_matrices,
)
from qamw_kernels.integrations.dtypes import kept_in_float32
from qamw_kernels.integrations.linears import LINEARS, sizes
from qamw_kernels.integrations.stored import (
    check_filled,
    check_merged,
    check_packed,
    check_unpacked,
    destinations,
    stored_tensors,
)
from qamw_kernels.ops.linear import linear as quantized_linear
from qamw_kernels.ops.weight import TiledWeight


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

    Its buffers are the tensors of docs/format.md until :meth:`pack` has run, then those of a
    :class:`TiledWeight`.
    """

    qweight: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    tiles: torch.Tensor
    entry_words: torch.Tensor

    def __init__(
        self, linear: nn.Linear | Conv1D, index_bits: int, rotation_block_size: int, code: str
    ) -> None:
        super().__init__()
        self.rotation_block_size = rotation_block_size
        self._code = code
        self._transposed = isinstance(linear, Conv1D)
        for name, (shape, dtype) in layer_tensors(*sizes(linear), index_bits).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = linear.bias
        # Not a parameter, and without memory: model code that initializes weights needs a weight to
        # look at, and leaves it alone if it has this mark of transformers.
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
        self.register_buffer("entry_words", weight.entry_words)
        del self.qweight

    def plain(self, name: str, dtype: torch.dtype) -> nn.Linear | Conv1D:
        """The layer that this one took the place of, with its weight decoded.

        Args:
            name: of the module, for errors.
        Raises:
            TensorError: see :func:`decode_checked`.
        """
        quantized = self._quantized()
        num_rows, num_inputs = quantized.shape
        weight = decode_checked(quantized, name, dtype)
        linear: nn.Linear | Conv1D
        with torch.device("meta"):
            if self._transposed:
                linear = Conv1D(num_rows, num_inputs)  # type: ignore[no-untyped-call]  # no types
                weight = weight.T.contiguous()
            else:
                linear = nn.Linear(num_inputs, num_rows, self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = TiledWeight(
            self.tiles,
            self.row_norms,
            self.input_scales,
            self.entry_words,
            self.rotation_block_size,
        )
        return quantized_linear(x, weight, self.bias)

    def _quantized(self) -> QuantizedWeight:
        return QuantizedWeight(
            self.qweight,
            self.row_norms,
            self.input_scales,
            self.rotation_block_size,
            self._code,
        )


@register_quantizer(QUANT_METHOD)
class QamwHfQuantizer(HfQuantizer):
    """Loads QAM-W checkpoints; it makes none: that is what ``qamw quantize`` is for."""

    requires_calibration = True
    quantization_config: QamwTransformersConfig
    _expert_converters: Sequence[WeightConverter] = ()
    _dtypes: Mapping[str, torch.dtype] = MappingProxyType({})

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Put a :class:`QamwLinear` in the place of every quantized layer.

        Raises:
            TensorError: a tensor is missing (transformers itself would continue with random
                numbers), has another shape or dtype, or is there twice.
        """
        fmt, stored = self.quantization_config.format, stored_tensors(kwargs["checkpoint_files"])
        transforms = get_model_conversion_mapping(model)
        if hasattr(HfQuantizer, "update_weight_conversions"):  # before 5.9 ours is not called
            self._expert_converters = expert_converters(model, transforms)
            transforms = self.update_weight_conversions(transforms)
        found = destinations(model, stored, transforms)
        check_merged(model, stored, found, fmt)
        for name, full in found.modules.items():
            module = model.get_submodule(name)
            if not isinstance(module, LINEARS):
                continue
            if full in fmt.ignore:
                check_unpacked(stored, full)
                continue
            num_rows, num_inputs = sizes(module)
            index_bits = fmt.index_bits_of(full)
            check_packed(stored, full, num_rows, num_inputs, index_bits)
            block_size = fmt.rotation_block_size_of(full, num_inputs)
            model.set_submodule(name, QamwLinear(module, index_bits, block_size, fmt.code))
        check_filled(model, found)
        self._dtypes = _dtypes(model)

    def update_weight_conversions(
        self, weight_conversions: Sequence[WeightTransform], *_: Any
    ) -> list[WeightTransform]:
        """Have transformers decode matrices before it merges or splits them.

        Args:
            _: the model, in newer versions of transformers.
        """
        fmt = self.quantization_config.format
        return [
            DecodingConverter(transform, fmt)
            if isinstance(transform, WeightConverter) and takes_matrices(transform)
            else transform
            for transform in (*weight_conversions, *self._expert_converters)
        ]

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """The dtype in which newer versions of transformers read a tensor; None: as stored."""
        return None if isinstance(converter, DecodingConverter) else dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, QamwLinear):
                if module.qweight.device.type == "cpu":
                    model.set_submodule(name, module.plain(name, module.weight.dtype))
                else:
                    module.pack(name)
        # A tensor that has another name in the checkpoint still has the dtype it has there.
        for name, tensor in model.state_dict(keep_vars=True).items():
            if (dtype := self._dtypes.get(name)) and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        if not any(isinstance(module, QamwLinear) for module in model.modules()):
            _forget_quantization(model)
        return model

    def is_serializable(self) -> bool:
        return False  # what is in memory is not what is on disk; the checkpoint is there already

    @property
    def is_trainable(self) -> bool:
        return False


def _forget_quantization(model: Any) -> None:
    """Remove the mark by which model code would take layers for packed ones: none is packed."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    """The dtypes in which transformers loads parameters and buffers of a plain checkpoint."""
    kept = kept_in_float32(model, model.dtype)
    return {
        name: torch.float32 if kept(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
