"""Mixtures of experts: every expert's matrices as linears of their own.

transformers holds the experts of a layer in parameters of three dimensions. A checkpoint may have
the same, or one tensor for every matrix, which transformers merges while loading. Taken apart,
experts are found, calibrated and decoded like all other linears.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offline_quantize.model.tensor_map import Conversion, Shape, TensorMap
from qamw_kernels.format.stacks import Slice, Stack, name_apart
from qamw_kernels.integrations.experts import (
    are_fused_experts,
    has_biases,
    interleaved,
    is_bias,
    pieces,
    sizes,
    transposed,
)


class Expert(nn.Module):
    """One expert: down(act(up(x))), or with a gate, down(f(gate(x), up(x))).

    Args:
        fused: transformers' module of all experts of the layer, with its parameters.
        activation: what is between the matrices.
    """

    def __init__(self, fused: Any, activation: "Activation") -> None:
        super().__init__()
        hidden, inner = sizes(fused)

        def linear(num_inputs: int, num_rows: int) -> nn.Linear:
            bias = has_biases(fused)
            dtype = fused.down_proj.dtype
            return nn.Linear(num_inputs, num_rows, bias=bias, device="meta", dtype=dtype)

        self.gate_proj = linear(hidden, inner) if activation.gated else None
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The expert's output [n, hidden size] for tokens x [n, hidden size]."""
        gate = self.gate_proj(x) if self.gate_proj else None
        out: torch.Tensor = self.down_proj(self.activation(gate, self.up_proj(x)))
        return out


class Activation(nn.Module):
    """What the experts of a layer do between their matrices, by transformers' own code.

    Attributes:
        gated: whether experts have a gate.
    """

    def __init__(self, fused: Any) -> None:
        """Made from transformers' module of all experts of the layer."""
        super().__init__()
        self.gated = hasattr(fused, "gate_up_proj")
        self._fused = fused

    def forward(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """The input of the last matrix, [n, inner size] like ``up`` and ``gate``."""
        fused = self._fused
        out: torch.Tensor
        if gate is None:
            out = fused.act_fn(up)
        elif not hasattr(fused, "_apply_gate"):
            out = fused.act_fn(gate) * up
        elif interleaved(fused):
            out = fused._apply_gate(torch.stack([gate, up], -1).flatten(-2))
        else:
            out = fused._apply_gate(torch.cat([gate, up], -1))
        return out


class Experts(nn.ModuleList):
    """The experts of a layer, in the place of transformers' fused ones.

    Attributes:
        all_run: whether every expert runs on all tokens, see :func:`all_experts_run`.
    """

    all_run = False

    def forward(
        self,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of what the chosen experts make of every token.

        Args:
            hidden: the tokens [T, hidden size]. Without an index, [experts * T, hidden size]: the
                tokens of every expert in turn, zeros where it does not get one (Llama 4).
            top_k_index: to which experts each is sent, [T, top k].
            top_k_weights: with which weights, [T, top k].
        Returns:
            As ``hidden``.
        """
        if self.all_run:
            own = hidden.clone()  # all read one tensor, which nothing else reads
            for expert in self:
                expert(own)
            return torch.zeros_like(hidden)
        if top_k_index is None or top_k_weights is None:
            return self._sorted(hidden)
        out = torch.zeros_like(hidden)
        for i, expert in enumerate(self):
            token, slot = torch.where(top_k_index == i)
            if len(token):
                weighted = expert(hidden[token]) * top_k_weights[token, slot, None]
                out = out.index_add(0, token, weighted.to(out.dtype))
        return out

    def _sorted(self, hidden: torch.Tensor) -> torch.Tensor:
        out = []
        for expert, tokens in zip(self, hidden.chunk(len(self)), strict=True):
            sent = tokens.any(1).nonzero()[:, 0]
            states = tokens.new_zeros(tokens.shape)
            out.append(states.index_copy(0, sent, expert(tokens[sent])) if len(sent) else states)
        return torch.cat(out)


@contextmanager
def all_experts_run(layer: nn.Module) -> Iterator[None]:
    """While active, all experts of a layer run, to be traced: without weights, none is chosen."""
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

    Experts that compute in a way of their own, or whose tensors are missing or otherwise arranged,
    are left as they are.
    """
    old: list[Conversion] = []
    new, stacks = [], []
    for path, fused in list(model.named_modules()):
        if not are_fused_experts(fused):
            continue
        merged, apart = [], _Apart([], [])
        for name, _ in fused.named_parameters(recurse=False):
            conversion = tensor_map.conversion_to(f"{path}.{name}")
            if conversion is None or not apart.add(path, fused, name, conversion):
                break
            merged.append(conversion)
        else:
            old += merged
            new += apart.conversions
            stacks += apart.stacks
            _replace(model, path, fused)
    tensor_map.replace(old, new, stacks)


def _replace(model: Any, path: str, fused: Any) -> None:
    """Put :class:`Experts` in the place of transformers' module, which loses its parameters."""
    activation = Activation(fused)
    experts = [Expert(fused, activation) for _ in range(len(fused.down_proj))]
    for name, _ in list(fused.named_parameters(recurse=False)):
        delattr(fused, name)
    model.set_submodule(path, Experts(experts))


@dataclass
class _Apart:
    """Where the parameters of experts that are taken apart come from."""

    conversions: list[Conversion]
    stacks: list[Stack]

    def add(self, path: str, fused: Any, name: str, conversion: Conversion) -> bool:
        """Take a parameter of the module at ``path`` apart; False where it is unclear how."""
        num_experts, parts = len(fused.down_proj), pieces(fused, name)
        sources = conversion.sources or (tuple(conversion.tensors),)
        num_sources = [len(names) for names in sources]
        if num_sources == [num_experts] * len(parts) and _are_matrices(conversion):
            for (part, _), tensors in zip(parts, sources, strict=True):
                self._take(path, part, conversion.tensors[tensors[0]], tensors)
            return True
        if num_sources == [1]:
            stacked = [(sources[0][0], parts)]
        elif num_sources == [1] * len(parts) and not interleaved(fused):
            stacked = [
                (tensor, [(part, slice(None))])
                for (tensor,), (part, _) in zip(sources, parts, strict=True)
            ]
        else:
            return False
        turned = transposed(fused) != conversion.transposes and not is_bias(name)
        for tensor, held in stacked:
            shape = conversion.tensors[tensor]
            if shape[0] != num_experts:
                return False
            apart = {
                part: [name_apart(tensor, expert, part) for expert in range(num_experts)]
                for part, _ in held
            }
            slices = {
                name: Slice(expert, rows, turned)
                for part, rows in held
                for expert, name in enumerate(apart[part])
            }
            stack = Stack(tensor, shape, slices)
            self.stacks.append(stack)
            for part, names in apart.items():
                self._take(path, part, stack.shape_of(names[0]), names)
        return True

    def _take(self, path: str, part: str, shape: Shape, names: Sequence[str]) -> None:
        self.conversions += [
            Conversion({name: shape}, {f"{path}.{expert}.{part}": shape})
            for expert, name in enumerate(names)
        ]


def _are_matrices(conversion: Conversion) -> bool:
    """Whether every tensor is the matrix of one expert, not transposed."""
    return conversion.keeps_inputs and {len(x) for x in conversion.tensors.values()} == {2}
