"""A model without its weights: built from config.json, and given parameters one part at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.files import CONFIG
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.experts import unfuse_experts

# Of modules that have tensors of their own: names in config.json, as transformers unifies them.
_COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")


def build_empty_model(checkpoint: Checkpoint) -> Any:
    """The transformers model of config.json, with parameters on the meta device and real buffers.

    Experts are taken apart (:mod:`offline_quantize.model.experts`). No code of the checkpoint runs.

    Raises:
        QuantizeError: transformers does not know the architecture, or refuses its config.json.
    """
    from accelerate import init_empty_weights  # both are slow to import
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

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
    with explained(unsupported), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
        unfuse_experts(model)
    return model.eval()


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
