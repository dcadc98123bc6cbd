"""The checkpoint tensor that is being read, so that layers can check what must arrive unchanged.

Where checkpoints store the rows of attention heads in another order than vLLM, its model classes
reorder what they load. That is right for the rows of planes and norms. But some (BLOOM) reorder
every tensor of a module, even input scales, which have no rows: the weights would be wrong, without
an error.
"""

import hashlib

import torch

from qamw_kernels.errors import TensorError


class Reading:
    """What is being read in this process.

    Attributes:
        name: of the tensor; empty before the first.
    """

    def __init__(self) -> None:
        self.name = ""
        self._input_scales: set[bytes] = set()

    def start(self) -> None:
        """No tensor has been handed over yet."""
        self.name = ""
        self._input_scales.clear()

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Record a tensor that is handed to vLLM's model next."""
        self.name = name
        if name.endswith(".input_scales"):
            self._input_scales.add(_digest(tensor))

    def finish(self) -> None:
        """All tensors were handed over; the name of the last one stays for error messages."""
        self._input_scales.clear()

    def check_input_scales(self, loaded: torch.Tensor) -> None:
        """Refuse input scales [K] that are none of those that were read.

        Model classes may load a module's scales after those of other modules. Scales that they load
        after all tensors were read are not checked: they may come from elsewhere.

        Raises:
            TensorError: names the tensor that was read last.
        """
        if self._input_scales and _digest(loaded) not in self._input_scales:
            raise TensorError(
                f"{self.name}: vLLM's model class reorders it, so it cannot serve this module "
                "quantized"
            )


def _digest(scales: torch.Tensor) -> bytes:
    """SHA-256 of the values of input scales."""
    return hashlib.sha256(scales.cpu().contiguous().numpy().tobytes()).digest()


READING = Reading()
"""Of the model that is being loaded."""
