"""The torch device of a request."""

import torch

from offline_quantize.errors import Option, QuantizeError


def usable_device(device: str) -> torch.device:
    """The torch device of a name: auto, cpu, cuda, cuda:1.

    Raises:
        QuantizeError: torch cannot use it.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return torch.empty(0, device=name).device
    except Exception as error:  # torch raises several kinds
        raise QuantizeError(Option("device", device), f": {error}") from None
