"""A tensor of a model, decoded from tensors of a checkpoint that another method quantized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from offline_quantize.errors import QuantizeError

Shape = tuple[int, ...]
Parts = Mapping[str, torch.Tensor]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Stored(Protocol):
    """What a shard's header describes of a tensor."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Encoded:
    """A tensor of the model that is made from tensors of the checkpoint.

    Attributes:
        name: in a plain checkpoint.
        shape: of its values.
        dtype: that it is decoded to.
        parts: what ``decode`` calls a tensor -> its name in the checkpoint.
        decode: the values, from those of the parts.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    parts: Mapping[str, str]
    decode: Callable[[Parts], torch.Tensor]

    def values(self, parts: Parts) -> torch.Tensor:
        """Decode it.

        Args:
            parts: by the names that ``decode`` has for them.
        Raises:
            QuantizeError: a scale is negative, or zero where a weight is not; or the result has
                another shape than headers say. ``decode`` may raise any other error.
        """
        for part, tensor in parts.items():
            if "scale" in part and (tensor.float() < 0).any():
                raise QuantizeError(f"{self.parts[part]}: a scale is negative")
        try:
            tensor = self.decode(parts)
        except QuantizeError as error:
            raise QuantizeError(f"{self.name}: ", *error.parts) from None
        if tensor.shape != self.shape:
            raise QuantizeError(
                f"{self.name}: decoded to shape {tuple(tensor.shape)}, expected {self.shape}"
            )
        return tensor
