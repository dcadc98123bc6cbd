"""What a quantized layer holds, and when.

While a checkpoint is loaded, a layer has the checkpoint's tensors, under their names. Then
``process_weights_after_loading`` replaces them by what ``apply`` multiplies with: a plain
``weight``, or the parameters ``tiles``, ``row_norms``, ``input_scales`` and the buffer
``entry_words`` of a :class:`TiledWeight`, for experts with a prefix.
"""

from collections.abc import Iterable
from enum import Enum
from typing import Any

from torch.nn import Parameter

from qamw_kernels.format.rates import QuantizedShape, stored_bits_per_weight
from qamw_kernels.ops.weight import TiledWeight

# vLLM's own mark on a layer. Its layer-by-layer reload removes the mark when it has put the
# checkpoint's tensors back on the layer.
_READY_MARK = "_already_called_process_weights_after_loading"


class LayerState(Enum):
    """Which tensors a layer holds."""

    LOADING = "those of the checkpoint"
    READY = "those that apply multiplies with"


def state_of(layer: Any) -> LayerState:
    """The state of a layer; vLLM may process it twice after loading, and may load it again."""
    return LayerState.READY if getattr(layer, _READY_MARK, False) else LayerState.LOADING


def mark_ready(layer: Any) -> None:
    """Record that the layer holds what ``apply`` multiplies with, until vLLM reloads it."""
    setattr(layer, _READY_MARK, True)


def register_tiled_weight(layer: Any, weight: TiledWeight, prefix: str = "") -> None:
    """Give the layer a packed weight, whose tensors are called ``<prefix>tiles`` and so on.

    The tiles have a second name, ``<prefix>qweight``, which is that of the planes that they
    replace. Nothing in this package reads it, but vLLM 0.24 to 0.33 does:

    - offloading to the CPU (``device_loading_context``, ``offloader/``) moves parameters to the GPU
      for the processing, and afterwards moves back those with the same names. PyTorch lists a
      parameter under its first name only, so ``qweight`` is registered first;
    - LoRA (``lora/layers/utils.py``) reads the device of ``qweight``, for experts ``w2_qweight``;
    - latent attention (``get_and_maybe_dequant_weights``) reads the device of ``qweight``, then
      it applies the layer to the identity matrix.
    """
    tiles = Parameter(weight.tiles, requires_grad=False)
    layer.register_parameter(f"{prefix}qweight", tiles)
    layer.register_parameter(f"{prefix}tiles", tiles)
    for name in ("row_norms", "input_scales"):
        parameter = Parameter(getattr(weight, name), requires_grad=False)
        layer.register_parameter(prefix + name, parameter)
    layer.register_buffer(f"{prefix}entry_words", weight.entry_words, persistent=False)


def tiled_weight_of(layer: Any, rotation_block_size: int, prefix: str = "") -> TiledWeight:
    """The packed weight that :func:`register_tiled_weight` gave to the layer.

    It is made anew for every call, because vLLM may move the registered tensors or replace them.
    """
    return TiledWeight(
        getattr(layer, f"{prefix}tiles"),
        getattr(layer, f"{prefix}row_norms"),
        getattr(layer, f"{prefix}input_scales"),
        getattr(layer, f"{prefix}entry_words"),
        rotation_block_size,
    )


class LoadSummary:
    """Adds up the quantized layers of one process, for one line in the log after the last one.

    Attributes:
        num_layers, num_weights, num_bytes: of the layers loaded so far; bytes in the checkpoint.
    """

    def __init__(self) -> None:
        self.num_layers = self.num_weights = self.num_bytes = 0
        self._expected = 0

    def expect_layer(self) -> None:
        """One more layer was made."""
        self._expected += 1

    def drop_layer(self) -> None:
        """An expected layer turned out to be plain; called before any layer is loaded whole."""
        self._expected -= 1

    def add_layer(self, shapes: Iterable[QuantizedShape]) -> bool:
        """One more layer, which holds these weights, was loaded; whether it was the last."""
        self.num_layers += 1
        for shape in shapes:
            self.num_weights += shape.num_weights
            self.num_bytes += shape.num_bytes
        return self.num_layers == self._expected

    def __str__(self) -> str:
        bits_per_weight = stored_bits_per_weight(self.num_bytes, self.num_weights)
        return (
            f"{self.num_layers} layers, {self.num_weights / 1e6:.1f} M weights of "
            f"{bits_per_weight:.2f} bits: {self.num_bytes / 1e6:.1f} MB, instead of "
            f"{2 * self.num_weights / 1e6:.1f} MB in 16 bits"
        )
