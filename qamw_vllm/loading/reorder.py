"""Rows that vLLM's model class reorders in plain weights, but not in planes and norms.

Heads lie otherwise in the checkpoints of Llama 4 than its class in vLLM computes with them. The
class reorders rows of tensors whose names it knows, ``weight`` among them. Its own code says here
how, so that packed tensors are reordered alike.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

Reorder = Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]
_ROWS = {"qweight": 1, "row_norms": 0}  # the dimension with the rows of the weight


def reordered(
    weights: Iterable[tuple[str, torch.Tensor]], model: torch.nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, as the class of a model reorders the weights that they stand for."""
    reorder = _reorder_of(model)
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
    return None
