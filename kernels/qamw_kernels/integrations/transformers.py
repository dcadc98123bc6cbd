"""QAM-W checkpoints in transformers::

    import qamw_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(CKPT)

On the CPU weights are decoded while loading and the layers become plain ones, as in vLLM; on a GPU they stay packed and the kernels run.
"""

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qamw_kernels.ops import linear as ops
from qamw_kernels.codec.encode import QuantizedWeight, decode_weight
from qamw_kernels.format.config import LAYER_TENSORS, QUANT_METHOD, QamwFormat, layer_tensors, role_of
from qamw_kernels.ops.tiling import tile_planes


@register_quantization_config(QUANT_METHOD)
class QamwTransformersConfig(QuantizationConfigMixin):
    """A :class:`QamwFormat` as transformers wants it.

    Raises:
        FormatError: an invalid, incomplete or unknown format.
    """

    def __init__(self, **config: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' type lists its own methods only
        self.format = QamwFormat.from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        return self.format.to_dict()


class QamwLinear(nn.Module):
    """A linear layer whose weight [N, K] is packed; tensors as in kernels/FORMAT.md until :meth:`pack` has run."""

    qweight: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    tiles: torch.Tensor
    quadrant_words: torch.Tensor

    def __init__(self, linear: nn.Linear, index_bits: int, rotation_block_size: int) -> None:
        super().__init__()
        self.rotation_block_size = rotation_block_size
        for name, (shape, dtype) in layer_tensors(linear.out_features, linear.in_features, index_bits).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = linear.bias

    def pack(self) -> None:
        """Bring the weight into the form that kernels read."""
        self.register_buffer("tiles", tile_planes(self.qweight))
        self.register_buffer("quadrant_words", ops.quadrant_words(len(self.qweight), self.qweight.device))
        del self.qweight

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weight decoded."""
        quantized = QuantizedWeight(self.qweight, self.row_norms, self.input_scales, self.rotation_block_size)
        linear = nn.Linear(quantized.shape[1], quantized.shape[0], self.bias is not None, device="meta")
        linear.weight = nn.Parameter(decode_weight(quantized).to(dtype), requires_grad=False)
        linear.bias = self.bias
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.tiles, self.row_norms, self.input_scales, self.quadrant_words, self.bias, self.rotation_block_size)


@register_quantizer(QUANT_METHOD)
class QamwHfQuantizer(HfQuantizer):
    """Loads QAM-W checkpoints; it makes none: that is what ``qamw quantize`` is for."""

    requires_calibration = True
    quantization_config: QamwTransformersConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Put a :class:`QamwLinear` in the place of every quantised layer.

        Raises:
            ValueError: a tensor is missing; transformers itself would go on with random numbers.
        """
        fmt, stored = self.quantization_config.format, set[str]()
        for file in kwargs["checkpoint_files"]:
            with safe_open(file, "pt") as shard:
                stored.update(shard.keys())
        if experts := sorted(name for name in stored if name.endswith(".qweight") and role_of(name) != name):
            raise ValueError(f"{experts[0]}: transformers merges experts while loading, which packed ones cannot be; use "
                             "qamw dequantize, or vLLM")
        for name, module in list(model.named_modules()):
            # Loaded without its head, a model has no prefix before its names.
            full = next((n for n in (name, f"{model.base_model_prefix}.{name}") if f"{n}.qweight" in stored), name)
            if not isinstance(module, nn.Linear) or full in fmt.ignore:
                continue
            missing = [f"{full}.{suffix}" for suffix in LAYER_TENSORS if f"{full}.{suffix}" not in stored]
            if missing:
                raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
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
