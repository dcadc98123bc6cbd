"""The two forms of the experts of a layer while they are loaded; see :mod:`qamw_vllm.loading.form`.

Packed tensors have one rate for w13 and one for w2. Plain weights are made by vLLM's own method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from qamw_kernels.format.config import LAYER_TENSORS, layer_tensors
from qamw_vllm.loading.form import allocate, no_tensor, note_for_reload
from qamw_vllm.state import LoadSummary

MATRICES = {"w13": ("w1", "w3"), "w2": ("w2",)}
"""First part of a parameter's name -> shard ids of the matrices stacked in it: gate, up; down."""

PLACES = {
    shard: (stem, position)
    for stem, shards in MATRICES.items()
    for position, shard in enumerate(shards)
}
"""Shard id -> first part of its parameters' names, and its position among the stacked matrices."""


@dataclass(frozen=True)
class ExpertsShape:
    """Sizes of the experts of one rank.

    Attributes:
        num_experts: on this rank.
        hidden: inputs of gate and up, rows of down.
        inner: inputs of down on this rank.
    """

    num_experts: int
    hidden: int
    inner: int

    def of(self, stem: str) -> tuple[int, int]:
        """N and K of w13 or w2 of an expert."""
        return (2 * self.inner, self.hidden) if stem == "w13" else (self.hidden, self.inner)


class ExpertsForm:
    """The parameters of vLLM's RoutedExperts.

    Args:
        layer: the layer.
        shape: its sizes.
        index_bits: w13 and w2 -> bits per pair that are expected; None for plain weights.
        loader: of all parameters, with vLLM's interface.
        make_plain: registers the parameters of plain experts.
        summary: of the quantized layers of the model in this process.

    Attributes:
        index_bits: of the form that the layer has now.
    """

    def __init__(
        self,
        layer: Any,
        shape: ExpertsShape,
        index_bits: dict[str, int] | None,
        loader: Callable[..., bool | None],
        make_plain: Callable[[], None],
        summary: LoadSummary,
    ) -> None:
        self._layer, self._shape, self._loader = layer, shape, loader
        self._make_plain, self._summary = make_plain, summary
        self._device = torch.get_default_device()
        self.index_bits = index_bits
        if index_bits is not None:
            summary.expect_layer()
            self._register_all()
            self._register_empty_plain()
        else:
            self._plain_and_empty()

    def become_plain(self) -> None:
        """Replace the parameters of packed experts by those of plain ones."""
        self.index_bits = None
        self._summary.drop_layer()
        for stem in MATRICES:
            for name in (*LAYER_TENSORS, "weight"):
                delattr(self._layer, f"{stem}_{name}")
        self._plain_and_empty()
        note_for_reload(self._layer)

    def change_rate(self, stem: str, index_bits: int) -> None:
        """Replace the planes of w13 or of w2 by planes of another rate."""
        assert self.index_bits is not None
        self.index_bits = {**self.index_bits, stem: index_bits}
        delattr(self._layer, f"{stem}_qweight")
        self._register(stem, "qweight")
        note_for_reload(self._layer)

    def drop_other(self) -> None:
        """Remove the empty parameters of the other form."""
        for stem in MATRICES:
            for name in LAYER_TENSORS if self.index_bits is None else ("weight",):
                delattr(self._layer, f"{stem}_{name}")

    def _plain_and_empty(self) -> None:
        with self._device:
            self._make_plain()
        for stem in MATRICES:
            getattr(self._layer, f"{stem}_weight").weight_loader = self._loader
        self._register_all()

    def _register_all(self) -> None:
        for stem in MATRICES:
            for name in LAYER_TENSORS:
                self._register(stem, name)

    def _register(self, stem: str, name: str) -> None:
        if self.index_bits is None:
            shape, dtype = no_tensor(name)
            self._add(f"{stem}_{name}", (0, *shape), dtype)
            return
        shape, dtype = layer_tensors(*self._shape.of(stem), self.index_bits[stem])[name]
        if name == "input_scales":  # every matrix brings its own copy
            shape = (len(MATRICES[stem]), *shape)
        self._add(f"{stem}_{name}", (self._shape.num_experts, *shape), dtype)

    def _register_empty_plain(self) -> None:
        for stem in MATRICES:
            self._add(f"{stem}_weight", (0, 0, 0), torch.get_default_dtype())

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        parameter = Parameter(allocate(shape, dtype, self._device), requires_grad=False)
        parameter.weight_loader = self._loader  # type: ignore[attr-defined]  # vLLM looks for it
        self._layer.register_parameter(name, parameter)
