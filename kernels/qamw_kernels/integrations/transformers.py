"""QAM-W checkpoints in transformers::

    import qamw_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(CKPT)

On the CPU weights are decoded while loading and the layers become plain ones, as in vLLM; on a GPU
they stay packed and the kernels run.
"""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.errors import TensorError
from qamw_kernels.format.config import (
    LAYER_TENSORS,
    QUANT_METHOD,
    QamwFormat,
    layer_tensors,
    role_of,
)
from qamw_kernels.format.weight import QuantizedWeight
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

    def pack(self) -> None:
        """Bring the weight into the form that kernels read."""
        weight = TiledWeight.of(self._quantized())
        self.register_buffer("tiles", weight.tiles)
        self.register_buffer("quadrant_words", weight.quadrant_words)
        del self.qweight

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weight decoded."""
        quantized = self._quantized()
        num_rows, num_inputs = quantized.shape
        linear = nn.Linear(num_inputs, num_rows, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(decode_weight(quantized).to(dtype), requires_grad=False)
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
            TensorError: a tensor is missing; transformers itself would go on with random numbers.
        """
        fmt, stored = self.quantization_config.format, _stored_names(kwargs["checkpoint_files"])
        _refuse_experts(stored)
        for name, module in list(model.named_modules()):
            # Loaded without its head, a model has no prefix before its names.
            names = (name, f"{model.base_model_prefix}.{name}")
            full = next((n for n in names if f"{n}.qweight" in stored), name)
            if not isinstance(module, nn.Linear) or full in fmt.ignore:
                continue
            tensors = [f"{full}.{suffix}" for suffix in LAYER_TENSORS]
            if missing := [tensor for tensor in tensors if tensor not in stored]:
                raise TensorError(f"the checkpoint lacks {', '.join(missing)}")
            block = fmt.rotation_block_size_of(full, module.in_features)
            model.set_submodule(name, QamwLinear(module, fmt.index_bits_of(full), block))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, QamwLinear):
                if module.qweight.device.type == "cpu":
                    model.set_submodule(name, module.plain(model.dtype))
                else:
                    module.pack()
        return model

    def is_serializable(self) -> bool:
        return False  # what is in memory is not what is on disk; the checkpoint is there already

    @property
    def is_trainable(self) -> bool:
        return False


def _stored_names(files: Iterable[str]) -> set[str]:
    """Names of the tensors in the files of a checkpoint."""
    stored: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as shard:
            stored.update(shard.keys())
    return stored


def _refuse_experts(stored: set[str]) -> None:
    packed = (name for name in stored if name.endswith(".qweight"))
    if experts := sorted(name for name in packed if role_of(name) != name):
        raise TensorError(
            f"{experts[0]}: transformers merges experts while loading, which packed ones cannot "
            "be; use qamw dequantize, or vLLM"
        )
