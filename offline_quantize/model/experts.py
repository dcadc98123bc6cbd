"""Mixtures of experts: every expert's matrices as linears of their own, named as in checkpoints.

transformers holds the experts of a layer in two parameters of three dimensions, and merges a
checkpoint's matrices into them while loading. Taken apart again, experts are found, calibrated and
decoded like all other linears:

1. ``_names_on_disk`` asks transformers how it merges and renames, which gives the names on disk.
2. ``unfuse_experts`` puts an :class:`Experts` in the place of every fused module.
3. Where checkpoints name the block around the experts otherwise, it is renamed too.
"""

import re
from typing import Any

import torch
from torch import nn


class Expert(nn.Module):
    """One gated expert: down(act(gate(x)) * up(x)).

    Args:
        fused: transformers' module of all experts of the layer.
        names: of the gate, up and down projections.
    """

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        _, hidden, inner = fused.down_proj.shape  # [experts, hidden size, inner size]
        gate, up, down = names
        for name, num_inputs, num_rows in (
            (gate, hidden, inner),
            (up, hidden, inner),
            (down, inner, hidden),
        ):
            linear = nn.Linear(
                num_inputs, num_rows, bias=False, device="meta", dtype=fused.down_proj.dtype
            )
            self.add_module(name, linear)
        self.act_fn = fused.act_fn
        self._names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The expert's output [n, hidden size] for tokens x [n, hidden size]."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        out: torch.Tensor = down(self.act_fn(gate(x)) * up(x))
        return out


class Experts(nn.ModuleList):
    """The experts of a layer, in the place of transformers' fused ones."""

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
        if hidden.is_meta:
            # While tracing, nobody knows which experts are chosen. All read one tensor, which
            # nothing else reads.
            own = hidden.clone()
            for expert in self:
                expert(own)
            return out
        for i, expert in enumerate(self):
            token, slot = torch.where(top_k_index == i)
            if len(token):
                weighted = expert(hidden[token]) * top_k_weights[token, slot, None]
                out = out.index_add(0, token, weighted.to(out.dtype))
        return out


def unfuse_experts(model: Any) -> None:
    """Take the experts of a model on the meta device apart, and name them as in checkpoints.

    Experts with biases, with activations of their own, or that checkpoints hold fused too, are left
    as they are.
    """
    names, renamed = _names_on_disk(model)
    if names is None:
        return
    for path, module in list(model.named_modules()):
        if not _can_unfuse(module):
            continue
        experts = Experts(Expert(module, names) for _ in range(len(module.down_proj)))
        model.set_submodule(path, experts)
        block_path = path.rpartition(".")[0]
        parent_path, _, name = block_path.rpartition(".")
        if name in renamed:
            parent, block = model.get_submodule(parent_path), model.get_submodule(block_path)
            del parent._modules[name]
            parent.add_module(renamed[name], block)
            object.__setattr__(parent, name, block)  # the model's own code uses this name


def _can_unfuse(module: Any) -> bool:
    """Whether this is a module of fused experts that compute what :class:`Expert` does."""
    parameters = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    gate = getattr(type(module), "_apply_gate", None)
    return (
        parameters == {"gate_up_proj": 3, "down_proj": 3}
        and getattr(module, "is_concatenated", True)
        and not getattr(module, "is_transposed", False)
        and (gate is None or gate.__name__ == "_default_apply_gate")
    )


def _names_on_disk(model: Any) -> tuple[tuple[str, str, str] | None, dict[str, str]]:
    """How checkpoints name the experts.

    Returns:
        (gate, up, down) of an expert, None where checkpoints hold experts fused; and the names of
        the blocks around them, in transformers -> in checkpoints.
    """
    from transformers.conversion_mapping import extract_weight_conversions_for_model  # slow

    found: dict[str, list[str]] = {}
    renamed = {}
    for conversion in extract_weight_conversions_for_model(model) or ():
        patterns = (conversion.target_patterns[0], *conversion.source_patterns)
        target, *sources = (pattern.replace("\\", "") for pattern in patterns)
        experts = [re.search(r"experts\.\*\.(\w+)\.weight", source) for source in sources]
        if all(experts):
            found[target.rpartition(".")[2]] = [match[1] for match in experts if match]
            continue
        here, there = (re.fullmatch(r"\.(\w+)\.", pattern) for pattern in (target, sources[0]))
        if here and there:
            renamed[here[1]] = there[1]
    names = (*found.get("gate_up_proj", ()), *found.get("down_proj", ()))
    return (names if len(names) == 3 else None), renamed
