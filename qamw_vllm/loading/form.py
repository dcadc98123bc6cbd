"""The two forms of a linear layer while it is loaded: packed tensors, or a plain weight.

Which one a checkpoint brings, and at which rate, is known for certain only when it arrives: vLLM's
model classes rename, stack and split what they load, each in its own way. So a layer has the
parameters of both forms, under their names, and those of one form are empty. What arrives for an
empty one changes the form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
)

from qamw_kernels.format.config import LAYER_TENSORS, layer_tensors
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_vllm.state import LayerState, LoadSummary, state_of

FORM_TENSORS = (*LAYER_TENSORS, "weight")


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a linear layer on one rank.

    Attributes:
        num_rows, num_inputs: N and K of this rank.
        num_shards: how many matrices vLLM stacks in the layer.
        dtype: of a plain weight.
    """

    num_rows: int
    num_inputs: int
    num_shards: int
    dtype: torch.dtype


def no_tensor(name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the empty parameter of a plain layer for one of LAYER_TENSORS."""
    shape, dtype = layer_tensors(0, UNIT_INPUTS, 0)[name]
    return tuple(0 for _ in shape), dtype


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialized memory for a parameter. An empty parameter is always on the CPU, where vLLM's
    offloading of weights leaves it alone.
    """
    return torch.empty(shape, dtype=dtype, device="cpu" if 0 in shape else device)


def note_for_reload(layer: Any) -> None:
    """Have vLLM's reload restore the parameters, and their loaders, that the layer has now."""
    get_layerwise_info(layer).restore_metadata = capture_layer_to_meta(layer)


class LayerForm:
    """The parameters of one vLLM linear layer.

    Args:
        layer: the layer, a LinearBase of vLLM.
        shape: its sizes.
        index_bits: bits per pair that are expected; None for a plain weight.
        loaders: name of a tensor -> loader of its parameter.
        summary: of the quantized layers of the model in this process.

    Attributes:
        index_bits: of the form that the layer has now.
    """

    def __init__(
        self,
        layer: Any,
        shape: LayerShape,
        index_bits: int | None,
        loaders: Mapping[str, Callable[..., None]],
        summary: LoadSummary,
    ) -> None:
        self._layer, self._shape, self._loaders = layer, shape, loaders
        self._summary = summary
        self._device = torch.get_default_device()
        self.index_bits = index_bits
        if index_bits is not None:
            summary.expect_layer()
        own = ("weight",) if index_bits is None else LAYER_TENSORS
        # Those that are empty come last: vLLM's offloading of weights looks at the device of the
        # first.
        for name in (*own, *(name for name in FORM_TENSORS if name not in own)):
            self._register(name)

    def change(self, index_bits: int | None) -> None:
        """Take the form of what arrives. If only the rate changes, norms and scales are kept."""
        before, self.index_bits = self.index_bits, index_bits
        changed = FORM_TENSORS if None in (before, index_bits) else ("qweight",)
        if before is None:
            self._summary.expect_layer()
        elif index_bits is None:
            self._summary.drop_layer()
        for name in changed:
            delattr(self._layer, name)  # frees its memory before the new one is made
            self._register(name)
        self._layer.update_param_tp_status()
        if state_of(self._layer) is LayerState.LOADING:
            note_for_reload(self._layer)

    def drop_other(self) -> None:
        """Remove the empty parameters of the other form."""
        for name in LAYER_TENSORS if self.index_bits is None else ("weight",):
            delattr(self._layer, name)

    def _register(self, name: str) -> None:
        shape, dtype = self._size(name)
        data, loader = allocate(shape, dtype, self._device), self._loaders[name]
        parameter: BasevLLMParameter
        if name == "weight":
            parameter = ModelWeightParameter(
                output_dim=0, input_dim=1, data=data, weight_loader=loader
            )
        elif name == "qweight":
            parameter = ModelWeightParameter(
                output_dim=1, input_dim=2, data=data, weight_loader=loader
            )
        elif name == "row_norms":
            parameter = ChannelQuantScaleParameter(output_dim=0, data=data, weight_loader=loader)
        else:
            parameter = BasevLLMParameter(data=data, weight_loader=loader)
        self._layer.register_parameter(name, parameter)

    def _size(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        rows, inputs = self._shape.num_rows, self._shape.num_inputs
        if name == "weight":
            return ((rows, inputs) if self.index_bits is None else (0, 0)), self._shape.dtype
        if self.index_bits is None:
            return no_tensor(name)
        shape, dtype = layer_tensors(rows, inputs, self.index_bits)[name]
        # Each stacked matrix brings its own copy of the input scales; that they agree is checked
        # after loading.
        return ((self._shape.num_shards, *shape) if name == "input_scales" else shape), dtype
