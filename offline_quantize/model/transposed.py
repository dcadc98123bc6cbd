"""Linear layers whose weight is [inputs, rows], GPT-2's, become ``nn.Linear``."""

from typing import Any

from offline_quantize.model.tensor_map import Conversion, TensorMap
from qamw_kernels.format.stacks import transposed_matrix


def straighten(model: Any, tensor_map: TensorMap) -> None:
    """Replace such layers of a model on the meta device.

    Those whose tensors are missing, or otherwise arranged, are left as they are.
    """
    from transformers.pytorch_utils import Conv1D  # slow to import

    from qamw_kernels.integrations.linears import straightened

    old, new, stacks = [], [], []
    for path, module in list(model.named_modules()):
        conversion = tensor_map.conversion_to(f"{path}.weight")
        if not isinstance(module, Conv1D) or conversion is None or conversion.transform:
            continue
        linear, (tensor,) = straightened(module), conversion.tensors
        shape = tuple(linear.weight.shape)
        old.append(conversion)
        new.append(Conversion({tensor: shape}, {f"{path}.weight": shape}))
        stacks.append(transposed_matrix(tensor, shape))
        model.set_submodule(path, linear)
    tensor_map.replace(old, new, stacks)
