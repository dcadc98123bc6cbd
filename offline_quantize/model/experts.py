"""Mixtures of experts: every expert's matrices as linears of their own, as in checkpoints.

transformers holds the experts of a layer in two parameters of three dimensions, and merges a
checkpoint's matrices into them while loading. Taken apart again, experts are found, calibrated and
decoded like all other linears.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from offline_quantize.model.tensor_map import Conversion, TensorMap

_FUSED = ("gate_up_proj", "down_proj")  # as transformers names what it merges
_PARTS = ("gate_proj", "up_proj", "down_proj")  # of one expert, in the order of merging


class Expert(nn.Module):
    """One gated expert: down(act(gate(x)) * up(x)).

    Args:
        fused: transformers' module of all experts of the layer.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        _, hidden, inner = fused.down_proj.shape  # [experts, hidden size, inner size]

        def linear(num_inputs: int, num_rows: int) -> nn.Linear:
            dtype = fused.down_proj.dtype
            return nn.Linear(num_inputs, num_rows, bias=False, device="meta", dtype=dtype)

        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)
        self.act_fn = fused.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The expert's output [n, hidden size] for tokens x [n, hidden size]."""
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """The experts of a layer, in the place of transformers' fused ones.

    Attributes:
        all_run: whether every expert runs on all tokens, see :func:`all_experts_run`.
    """

    all_run = False

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of what the chosen experts make of every token.

        Args:
            hidden: the tokens [T, hidden size].
            top_k_index: to which experts each is sent, [T, top k].
            top_k_weights: with which weights, [T, top k].
        Returns:
            [T, hidden size] in the dtype of ``hidden``.
        """
        out = torch.zeros_like(hidden)
        if self.all_run:
            own = hidden.clone()  # all read one tensor, which nothing else reads
            for expert in self:
                expert(own)
            return out
        for i, expert in enumerate(self):
            token, slot = torch.where(top_k_index == i)
            if len(token):
                weighted = expert(hidden[token]) * top_k_weights[token, slot, None]
                out = out.index_add(0, token, weighted.to(out.dtype))
        return out


@contextmanager
def all_experts_run(layer: nn.Module) -> Iterator[None]:
    """While active, every expert of a layer runs, for nothing: without weights, none is chosen."""
    blocks = [module for module in layer.modules() if isinstance(module, Experts)]
    for block in blocks:
        block.all_run = True
    try:
        yield
    finally:
        for block in blocks:
            del block.all_run


def unfuse_experts(model: Any, tensor_map: TensorMap) -> None:
    """Take the experts of a model on the meta device apart.

    Experts with biases, with activations of their own, or that the checkpoint holds fused too, are
    left as they are.
    """
    fused: list[Conversion] = []
    apart: list[Conversion] = []
    for path, module in list(model.named_modules()):
        if not _can_unfuse(module):
            continue
        num_experts, hidden, inner = module.down_proj.shape
        found = [tensor_map.conversion_to(f"{path}.{name}") for name in _FUSED]
        merged = [conversion for conversion in found if conversion]
        sources = [names for conversion in merged for names in conversion.sources]
        if [len(names) for names in sources] != [num_experts] * len(_PARTS):
            continue
        model.set_submodule(path, Experts(Expert(module) for _ in range(num_experts)))
        shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
        fused += merged
        apart += [
            Conversion({name: shape}, {f"{path}.{number}.{part}.weight": shape})
            for part, shape, names in zip(_PARTS, shapes, sources, strict=True)
            for number, name in enumerate(names)
        ]
    tensor_map.replace(fused, apart)


def _can_unfuse(module: Any) -> bool:
    """Whether this is a module of fused experts that compute what :class:`Expert` does."""
    parameters = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    gate = getattr(type(module), "_apply_gate", None)
    return (
        parameters == dict.fromkeys(_FUSED, 3)
        and getattr(module, "is_concatenated", True)
        and not getattr(module, "is_transposed", False)
        and (gate is None or gate.__name__ == "_default_apply_gate")
    )
