"""Rows that vLLM's model class reorders in plain weights, and would not in planes and norms.

Heads lie otherwise in the checkpoints of Llama 4 and BLOOM than their classes in vLLM compute with
them. Their own code says here how rows of a weight are reordered, so that those of its packed
tensors are reordered alike.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from qamw_kernels.format.config import LAYER_TENSORS

Weights = Iterable[tuple[str, torch.Tensor]]
Reorder = Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]
_ROWS = {"qweight": 1, "row_norms": 0}  # the dimension with the rows of the weight


def reordered(weights: Weights, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, as the class of a model reorders the weights that they stand for.

    A class that reorders all tensors of some layers, whatever they are, leaves packed ones alone
    from now on.
    """
    return _reordered(weights, _reorder_of(model))  # found before the class's own code runs


def _reordered(weights: Weights, reorder: Reorder | None) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        module, _, suffix = name.rpartition(".")
        if reorder is not None and suffix in _ROWS:
            rows = torch.arange(tensor.shape[_ROWS[suffix]], device=tensor.device)
            _, order = reorder(f"{module}.weight", rows[:, None])
            yield name, tensor.index_select(_ROWS[suffix], order[:, 0])
        else:
            yield name, tensor


def _reorder_of(model: torch.nn.Module) -> Reorder | None:
    """The model class's own function from a weight's name and value to what it loads."""
    for module in model.modules():
        if reorder := getattr(module, "permute_qk_weight_for_rotary", None):
            return reorder  # type: ignore[no-any-return]  # vLLM's
        if repack := getattr(module, "_repack_qkv", None):
            return _without_packed(module, repack)
    return None


def _without_packed(module: torch.nn.Module, repack: Callable[[Weights], Weights]) -> Reorder:
    """What BLOOM's class does with one weight.

    It does so with every tensor of a layer ``query_key_value``; from now on, not with packed ones.
    """

    def repack_others(weights: Weights) -> Weights:
        for name, tensor in weights:
            packed = name.rpartition(".")[2] in LAYER_TENSORS
            yield from [(name, tensor)] if packed else repack([(name, tensor)])

    if "_repack_qkv" not in vars(module):  # a reload finds it done
        module._repack_qkv = repack_others  # type: ignore[assignment]  # hides that of the class
    return lambda name, tensor: next(iter(repack([(name, tensor)])))
