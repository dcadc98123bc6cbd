"""Parameters that are tied to each other, as head and embeddings often are.

config.json says which parameters may share one tensor. The checkpoint decides: a parameter that has
a tensor of its own uses it, and only one that has none shares another's. transformers does the
same: it looks at the config of the model's own class and shares in both directions. So does vLLM,
which builds a head of its own if the checkpoint has one.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from offline_quantize.model.checkpoint import Checkpoint

_COMPARED_ELEMENTS = 2**24  # of each of two tensors, in memory at once


def tied_groups(model: Any) -> list[list[str]]:
    """Names of parameters that config.json ties; first the one that transformers saves."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    groups: dict[str, list[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        if {name, source} <= parameters:
            groups.setdefault(source, [source]).append(name)
    return list(groups.values())


def share_tensors(model: Any, shared: Mapping[str, str]) -> None:
    """Put one parameter in the place of all that use its tensor.

    Args:
        shared: name of a parameter -> name of the one whose tensor it uses.
    """
    for name, holder in shared.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, model.get_parameter(holder))


def any_differ(checkpoint: Checkpoint, pairs: Collection[tuple[str, str]]) -> bool:
    """Whether the two tensors of any pair have different values.

    They are read in parts, unless they have to be decoded.
    """
    return any(_differ(checkpoint, *pair) for pair in pairs)


def _differ(checkpoint: Checkpoint, first: str, second: str) -> bool:
    infos = [checkpoint.tensors[name] for name in (first, second)]
    if infos[0].shape != infos[1].shape or infos[0].dtype != infos[1].dtype:
        return True
    if checkpoint.decodes(first) or checkpoint.decodes(second):
        return not torch.equal(*(tensor for _, tensor in checkpoint.load((first, second))))
    rows, *others = infos[0].shape
    step = max(1, _COMPARED_ELEMENTS // max(1, torch.Size(others).numel()))
    files: list[Path] = [checkpoint.directory / info.file for info in infos]
    with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as other:
        slices = one.get_slice(first), other.get_slice(second)
        return not all(
            torch.equal(*(part[start : start + step] for part in slices))
            for start in range(0, rows, step)
        )
