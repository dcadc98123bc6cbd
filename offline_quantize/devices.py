"""The torch device of a request."""

import torch

from offline_quantize.errors import Option, QuantizeError, shortened


def usable_device(device: str, local: int = 0) -> torch.device:
    """The torch device of a name: auto, cpu, cuda, cuda:1.

    Args:
        local: which of several processes on this machine asks; each gets a GPU of its own.
    Raises:
        QuantizeError: torch cannot use it.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda" and local:
        name = f"cuda:{local}"
    if name == "meta":  # torch can use it, but it holds no values
        raise QuantizeError(Option("device", device), ": expected auto, cpu or cuda")
    try:
        usable = torch.empty(0, device=name).device
        if usable.type == "cuda":
            torch.cuda.set_device(usable)  # also for other packages' kernels, as mamba_ssm's
        return usable
    except Exception as error:  # torch raises several kinds
        raise QuantizeError(Option("device", device), f": {shortened(error)}") from None


def kind_of(device: torch.device) -> str:
    """The type of a device, or the name of a GPU: what decides how results are rounded."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
