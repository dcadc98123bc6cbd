"""A model without its weights: built from config.json, and given parameters one part at a time."""

import math
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import nn

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.files import CONFIG
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.experts import unfuse_experts

# Of modules that have tensors of their own: names in config.json, as transformers unifies them.
_COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")


# transformers changes settings of the whole process while it builds a model.
_BUILDING = Lock()


def build_empty_model(checkpoint: Checkpoint) -> Any:
    """The transformers model of config.json, without weights.

    Parameters, and buffers that checkpoints have, are on the meta device; all other buffers hold
    what transformers computes for them. Experts are taken apart
    (:mod:`offline_quantize.model.experts`). No code of the checkpoint runs.

    Raises:
        QuantizeError: transformers does not know the architecture, or refuses its config.json.
    """
    from transformers import (  # slow to import
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
    )

    unsupported = f"{checkpoint.directory / CONFIG}: unsupported architecture"
    with explained(unsupported):
        config = AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=False
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        names = [config.model_type, *(config.architectures or ())]
        raise QuantizeError(
            f"{unsupported} {' '.join(names)}: expected one whose decoder makes text, and which "
            "transformers' AutoModelForCausalLM knows"
        )
    _check_counts(checkpoint, config)
    with explained(unsupported), _BUILDING:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
        _compute_buffers(model)
        unfuse_experts(model)
    return model.eval()


def _compute_buffers(model: Any) -> None:
    """Compute the buffers of a model on the meta device that no checkpoint has."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, attribute = name.rpartition(".")
        real = torch.empty_like(buffer, device="cpu")
        # One that transformers forgets shall be noticed.
        setattr(
            model.get_submodule(path),
            attribute,
            real.fill_(math.nan if real.is_floating_point() else 0),
        )
    for module in model.modules():
        module._is_hf_initialized = False  # it was, on the meta device
    model.initialize_weights()


def _check_counts(checkpoint: Checkpoint, config: Any) -> None:
    """Refuse more layers or experts than tensors, which would take for ever to build."""
    text = config.get_text_config()
    num_tensors = sum(info.num_bytes > 0 for info in checkpoint.tensors.values())
    for name in _COUNTS:
        count = getattr(text, name, None)
        if isinstance(count, int) and count > num_tensors:
            raise QuantizeError(
                f"{checkpoint.directory / CONFIG}: {name} is {count}, but the checkpoint has only "
                f"{num_tensors} tensors that are not empty"
            )


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and module of the repeated decoder layers: the ``nn.ModuleList`` with most parameters.

    Raises:
        QuantizeError: the model has no ``nn.ModuleList``.
    """

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and m]
    if not lists:
        raise QuantizeError(
            f"unsupported architecture {type(model).__name__}: it has no repeated layers"
        )
    return max(lists, key=lambda item: size(item[1]))


def set_parameters(
    module: nn.Module,
    make: Callable[[str, torch.Tensor], torch.Tensor],
    skip: str = "",
    buffers: bool = False,
) -> None:
    """Replace every parameter of a module, in place.

    Args:
        make: is called with a parameter's name and the old one; returns the new one.
        skip: name of a submodule that is left alone, with all that is inside it.
        buffers: whether to replace buffers too.
    """
    for prefix, submodule in module.named_modules():
        if skip and (prefix + ".").startswith(skip + "."):
            continue
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            setattr(submodule, name, nn.Parameter(make(full, parameter), requires_grad=False))
        for name, buffer in list(submodule.named_buffers(recurse=False)) if buffers else ():
            setattr(submodule, name, make(f"{prefix}.{name}" if prefix else name, buffer))
