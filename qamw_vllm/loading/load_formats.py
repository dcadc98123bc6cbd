"""vLLM's load formats: which of them quantized layers can be loaded with."""

import torch
from vllm.config import get_current_vllm_config_or_none

from qamw_kernels.errors import FormatError

CHECKED_FORMATS = (
    *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor"),
    *("mistral", "npcache", "pt"),
)
"""Those of vLLM's default loader, see :mod:`qamw_vllm.loader`."""

DUMMY_FORMAT = "dummy"
"""That of random weights."""

# They store what vLLM's layers hold once they are loaded, instead of what a checkpoint holds.
_STATES = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")
# Plain weights of vLLM's dummy models are uniform between -1e-3 and 1e-3: rows have this norm.
_ROW_NORM = 1e-3 / 3**0.5


def current_load_format() -> str:
    """The load format of the model that is being made; vLLM's default outside of an engine."""
    config = get_current_vllm_config_or_none()
    return "auto" if config is None else str(config.load_config.load_format)


def loads_dummy_weights() -> bool:
    """Whether the model that is being made gets random weights instead of a checkpoint's."""
    return current_load_format() == DUMMY_FORMAT


def check_load_format(load_format: str) -> None:
    """Refuse formats that store loaded layers, and those without a loader of this plugin.

    The loaders in :mod:`qamw_vllm.loader` are needed even if checkpoints are not verified: they
    reorder rows, among other things.

    Raises:
        FormatError: says what can be done.
    """
    if load_format in _STATES:
        raise FormatError(
            f"load_format={load_format!r}: qamw loads checkpoints, not layers that vLLM saved; "
            "leave the option out"
        )
    if load_format in (*CHECKED_FORMATS, DUMMY_FORMAT):
        return
    raise FormatError(
        f"load_format={load_format!r}: its loader does not support packed weights, and does "
        f"not notice missing ones; expected one of {', '.join((*CHECKED_FORMATS, DUMMY_FORMAT))}"
    )


def fill_with_dummy_values(
    qweight: torch.Tensor, row_norms: torch.Tensor, input_scales: torch.Tensor
) -> None:
    """Random codewords, in weights about as large as the plain ones of vLLM's dummy models.

    The tensors are of any shape, with the dtypes of the format.
    """
    generator = torch.Generator(device=qweight.device).manual_seed(qweight.numel())
    qweight.random_(-(2**31), 2**31 - 1, generator=generator)
    row_norms.fill_(_ROW_NORM)
    input_scales.fill_(1)
