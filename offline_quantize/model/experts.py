"""Mixtures of experts: every expert's matrices as linears of their own, under the names that they have in checkpoints.

transformers holds the experts of a layer in two parameters of three dimensions, and merges a checkpoint's matrices into them while loading.
Taken apart again, experts are found, calibrated and decoded like all other linears.
"""

import re
from typing import Any

import torch
from torch import nn


class Expert(nn.Module):
    """One gated expert: down(act(gate(x)) * up(x))."""

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        inner, hidden = fused.down_proj.shape[2], fused.down_proj.shape[1]
        for name, shape in zip(names, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True):
            self.add_module(name, nn.Linear(*shape, bias=False, device="meta", dtype=fused.down_proj.dtype))
        self.act_fn, self._names = fused.act_fn, names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._names)
        return down(self.act_fn(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """In the place of transformers' fused experts; called with the tokens [T, hidden size] and where each is sent, [T, top k]."""

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        if hidden.is_meta:  # traced: nobody knows who is chosen, and all read the same tensor, but nobody else does
            own = hidden.clone()
            for expert in self:
                expert(own)
            return out
        for i, expert in enumerate(self):
            token, slot = torch.where(top_k_index == i)
            if len(token):
                out = out.index_add(0, token, (expert(hidden[token]) * top_k_weights[token, slot, None]).to(out.dtype))
        return out


def unfuse_experts(model: Any) -> None:
    """Take the experts of a model on the meta device apart, and name them as in checkpoints.

    Experts with biases, with activations of their own, or that checkpoints hold fused too, are left as they are.
    """
    names, renamed = _names_on_disk(model)
    if names is None:
        return
    for path, module in list(model.named_modules()):
        if not _can_unfuse(module):
            continue
        model.set_submodule(path, Experts(Expert(module, names) for _ in range(len(module.down_proj))))
        block_path = path.rpartition(".")[0]
        parent_path, _, name = block_path.rpartition(".")
        if name in renamed:
            parent, block = model.get_submodule(parent_path), model.get_submodule(block_path)
            del parent._modules[name]
            parent.add_module(renamed[name], block)
            object.__setattr__(parent, name, block)  # the model's own code knows it by this name


def _can_unfuse(module: Any) -> bool:
    parameters = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    gate = getattr(type(module), "_apply_gate", None)
    return (parameters == {"gate_up_proj": 3, "down_proj": 3} and getattr(module, "is_concatenated", True)
            and not getattr(module, "is_transposed", False) and (gate is None or gate.__name__ == "_default_apply_gate"))


def _names_on_disk(model: Any) -> tuple[tuple[str, str, str] | None, dict[str, str]]:
    """(gate, up, down) of an expert in checkpoints, None where they are fused there too, and the blocks' name here -> there."""
    from transformers.conversion_mapping import extract_weight_conversions_for_model  # slow to import

    found: dict[str, list[str]] = {}
    renamed = {}
    for conversion in extract_weight_conversions_for_model(model) or ():
        target, *sources = (pattern.replace("\\", "") for pattern in (conversion.target_patterns[0], *conversion.source_patterns))
        experts = [re.search(r"experts\.\*\.(\w+)\.weight", source) for source in sources]
        if all(experts):
            found[target.rpartition(".")[2]] = [match[1] for match in experts if match]
        elif (here := re.fullmatch(r"\.(\w+)\.", target)) and (there := re.fullmatch(r"\.(\w+)\.", sources[0])):
            renamed[here[1]] = there[1]
    names = (*found.get("gate_up_proj", ()), *found.get("down_proj", ()))
    return (names if len(names) == 3 else None), renamed
