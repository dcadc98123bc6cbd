"""transformers' modules that multiply with a matrix: ``nn.Linear``, and GPT-2's ``Conv1D``."""

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEARS = (nn.Linear, Conv1D)


def sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """N and K: how many outputs and inputs a linear layer has."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx


def straightened(module: Conv1D) -> nn.Linear:
    """The same layer as ``nn.Linear``: its weight [N, K] on the meta device, its bias the same."""
    num_rows, num_inputs = sizes(module)
    dtype = module.weight.dtype
    linear = nn.Linear(num_inputs, num_rows, bias=False, device="meta", dtype=dtype)
    linear.bias = module.bias
    return linear
