"""Reorders rows of planes and norms as vLLM's model class reorders the rows of plain weights.

The checkpoints of Llama 4 and BLOOM store the rows of attention heads in another order than vLLM's
classes compute with. The code of these classes is applied to row numbers here: that gives the order
of a weight's rows, and its packed tensors get the same one.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from qamw_kernels.format.config import LAYER_TENSORS

Weights = Iterable[tuple[str, torch.Tensor]]
Reorder = Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]
_ROWS = {"qweight": 1, "row_norms": 0}  # the dimension with the rows of the weight


def reordered(weights: Weights, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, with the rows of packed ones in the order that the model class uses.

    If the class itself would reorder every tensor of some layers, it is changed here so that it
    leaves packed tensors alone from now on.
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

    It would do the same with every tensor of a layer ``query_key_value``; its method is replaced
    here by one that leaves packed tensors alone.
    """

    def repack_others(weights: Weights) -> Weights:
        for name, tensor in weights:
            packed = name.rpartition(".")[2] in LAYER_TENSORS
            yield from [(name, tensor)] if packed else repack([(name, tensor)])

    if "_repack_qkv" not in vars(module):  # else this is a reload: already replaced
        module._repack_qkv = repack_others  # type: ignore[assignment]  # hides the class's method
    return lambda name, tensor: next(iter(repack([(name, tensor)])))
