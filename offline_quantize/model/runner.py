"""Runs a model that is larger than memory: one decoder layer at a time."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from offline_quantize.errors import QuantizeError
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import (
    build_empty_model,
    decoder_layers,
    loaded_dtype,
    name_of,
    set_parameters,
    text_decoder,
)
from offline_quantize.model.products import quick_products
from offline_quantize.model.structure import DecoderLayer
from offline_quantize.model.tied import share_tensors
from offline_quantize.model.tracing import LayerCall, record_layer_calls

BATCH = 4  # windows per forward call
DTYPE = torch.bfloat16  # as layers are served


class LayerRunner:
    """Runs the decoder layers of a checkpoint over tokens, with one layer's weights in memory.

    Hidden states between two layers are kept in CPU memory.

    Attributes:
        device: on which layers run.
        model: the whole model; its decoder layers have weights only while they are loaded.
        layers_name: module name of the list of decoder layers.
        layers: the decoder layers.
        calls: those of the layers with the last batch.
        hidden: what the next layer reads, by batch, in ``dtype``: [batch, T, hidden size], or with
            several states of each token (see :func:`window_dimension`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        """Load all but the decoder layers, and embed the tokens.

        Args:
            tokens: [windows, T] int64; there may be no window.
            dtype: of parameters, see :func:`loaded_dtype`, and hidden states.
        Raises:
            QuantizeError: the architecture is not supported.
            TensorError: a tensor outside the decoder layers is not finite.
        """
        self.device = device
        self.model, self._tensor_map = build_empty_model(checkpoint)
        self.layers_name, self.layers = decoder_layers(self.model)
        self._dtype_of = loaded_dtype(self.model, dtype)
        self._load_outside_layers(checkpoint)
        self.hidden: list[torch.Tensor] = []
        self.calls: list[LayerCall] = []
        # Masks and positions: (args, kwargs) for every batch and layer.
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        for part in torch.split(tokens, BATCH) if len(tokens) else ():
            calls = record_layer_calls(self.model, self.layers, part.to(device))
            self._arguments.append([(call.args, call.kwargs) for call in calls])
            self.hidden.append(calls[0].hidden.cpu())
            self.calls = calls

    def _load_outside_layers(self, checkpoint: Checkpoint) -> None:
        """Load what reading text needs, without the towers of a model that also sees or hears."""
        layers = f"{self.layers_name}."
        wanted = {
            tensor: None
            for module in (text_decoder(self.model), self.model.get_output_embeddings())
            if module is not None
            for tensor in self._tensor_map.tensors_of(name_of(self.model, module))
        }
        inside = set(self._tensor_map.tensors_of(layers))
        tensors = checkpoint.load_finite(name for name in wanted if name not in inside)
        values = dict(self._tensor_map.parameters(self._tensor_map.apart(tensors)))

        def stored(name: str, old: torch.Tensor) -> torch.Tensor:
            if name in values:
                return values.pop(name).to(self.device, self._dtype_of(name, old))
            if old.is_meta and old.is_floating_point():
                # Models take a device from any weight. NaN shows if its values are used.
                return old.new_full((), math.nan, device=self.device).expand(old.shape)
            return old if old.is_meta else old.to(self.device)

        set_parameters(self.model, stored, skip=self.layers_name, buffers=True)
        share_tensors(self.model, self._tensor_map.shared())

    def load(self, layer: DecoderLayer, weights: Mapping[str, torch.Tensor]) -> None:
        """Give a decoder layer its parameters, from tensors as :meth:`DecoderLayer.load` has them.

        The weights of quantized matrices may be other values of the same shapes.
        """
        apart = self._tensor_map.apart(weights.items(), {stack.name for stack in layer.stacks})
        parameters = dict(self._tensor_map.parameters(apart))

        def given(name: str, old: torch.Tensor) -> torch.Tensor:
            full = f"{layer.name}.{name}"
            tensor = parameters.get(full)
            if tensor is None:
                return old.to(self.device)
            return tensor.to(self.device, self._dtype_of(full, old))

        set_parameters(self.layers[layer.index], given, buffers=True)

    def unload(self, index: int) -> None:
        """Free the tensors of decoder layer ``index``."""
        set_parameters(self.layers[index], lambda _, p: torch.empty_like(p, device="meta"))

    def unload_embeddings_and_head(self) -> None:
        """Free the weights of embeddings and head, which the decoder layers do not need.

        One zero takes the place of each, so that the model can still be called.
        """
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        done = {id(p) for module in ends if module is not None for p in module.parameters()}
        set_parameters(
            self.model,
            lambda _, p: p.new_zeros(()).expand(p.shape) if id(p) in done else p,
            skip=self.layers_name,
        )

    def run(self, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of decoder layer ``index`` for the hidden states of batch number ``batch``."""
        args, kwargs = self._arguments[batch][index]
        with quick_products(self.device):
            out = self.layers[index](hidden, *args, **kwargs)
        first: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return first

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run decoder layer ``index`` over all batches, and go on to the next.

        Raises:
            QuantizeError: the layer's output is not finite.
        """
        self.hidden = [
            self.run(index, i, batch.to(self.device)).cpu() for i, batch in enumerate(self.hidden)
        ]
        if not all(batch.isfinite().all() for batch in self.hidden):
            raise QuantizeError(
                f"{self.layers_name}.{index}: its output is not finite on the calibration text"
            )


def window_dimension(hidden: torch.Tensor, window_tokens: int) -> int:
    """The dimension of hidden states that counts windows; the next one counts their tokens.

    With several states per token, there is one more dimension: before these two in Gemma 3n, after
    them in DeepSeek-V4.
    """
    return hidden.shape.index(window_tokens, 1) - 1
