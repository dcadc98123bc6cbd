"""The checkpoint tensor that is being read, so that layers can check what must arrive unchanged.

Where checkpoints store the rows of attention heads in another order than vLLM, its model classes
reorder what they load. That is right for the rows of planes and norms. But some (BLOOM) reorder
every tensor of a module, even input scales, which have no rows: the weights would be wrong, without
an error.
"""

import torch

from qamw_kernels.errors import TensorError


class Reading:
    """What is being read in this process.

    Attributes:
        name: of the tensor; empty before the first.
    """

    def __init__(self) -> None:
        self.name = ""
        self._tensor: torch.Tensor | None = None

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Record a tensor that is handed to vLLM's model next."""
        self.name, self._tensor = name, tensor if name.endswith(".input_scales") else None

    def finish(self) -> None:
        """All tensors were handed over; the name of the last one stays for error messages."""
        self._tensor = None

    def start(self) -> None:
        """No tensor has been handed over yet."""
        self.name, self._tensor = "", None

    def check_input_scales(self, loaded: torch.Tensor) -> None:
        """Refuse input scales [K] that differ from those that were read.

        Tensors that vLLM's model has kept for later cannot be checked.

        Raises:
            TensorError: names the tensor.
        """
        if self._tensor is not None and not torch.equal(loaded, self._tensor.to(loaded.device)):
            raise TensorError(
                f"{self.name}: vLLM's model class reorders it, so it cannot serve this module "
                "quantized"
            )


READING = Reading()
"""Of the model that is being loaded."""
