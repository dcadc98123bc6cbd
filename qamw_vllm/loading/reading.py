"""The tensor of a checkpoint that is being read, for those that layers must get as they are.

Model classes of vLLM reorder what they load where heads lie otherwise on disk. That is right for
the rows of planes and norms. But some reorder everything of a module (BLOOM), also what has no
rows: such weights would be others, without a word.
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
        """A tensor is handed to vLLM's model."""
        self.name, self._tensor = name, tensor if name.endswith(".input_scales") else None

    def finish(self) -> None:
        """All are; the name of the last one stays for messages."""
        self._tensor = None

    def start(self) -> None:
        """Nothing is yet."""
        self.name, self._tensor = "", None

    def check_input_scales(self, loaded: torch.Tensor) -> None:
        """Refuse input scales [K] that are not those that were read.

        Nothing is known of tensors that vLLM's model has kept for later.

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
