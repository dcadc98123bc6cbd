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
from offline_quantize.model.tensor_map import TensorMap, plain_shapes

# Of modules that have tensors of their own: names in config.json, as transformers unifies them.
_COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")


# transformers changes settings of the whole process while it builds a model.
_BUILDING = Lock()


def build_empty_model(checkpoint: Checkpoint) -> tuple[Any, TensorMap]:
    """The transformers model of config.json, without weights, and where those are.

    It is of the class that config.json names. Parameters, and buffers that checkpoints have, are on
    the meta device; all other buffers hold what transformers computes for them. Experts are taken
    apart (:mod:`offline_quantize.model.experts`). No code of the checkpoint runs.

    Raises:
        QuantizeError: transformers does not know the architecture, or refuses its config.json.
    """
    from transformers import AutoConfig  # slow to import

    unsupported = f"{checkpoint.directory / CONFIG}: unsupported architecture"
    with explained(unsupported):
        config = AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=False
        )
    model_class = _model_class(config)
    if model_class is None:
        names = [config.model_type, *map(str, config.architectures or ())]
        raise QuantizeError(
            f"{unsupported} {' '.join(names)}: expected one whose decoder reads text, and which "
            "transformers knows"
        )
    _check_counts(checkpoint, config)
    with explained(unsupported), _BUILDING:
        with torch.device("meta"):
            model = model_class._from_config(config)
        _compute_buffers(model)
        tensor_map = TensorMap(model, plain_shapes(checkpoint))
        unfuse_experts(model, tensor_map)
    return model.eval(), tensor_map


def _model_class(config: Any) -> Any:
    """The class that config.json names, or else transformers' own choice; None if it has none."""
    import transformers

    listed = config.architectures if isinstance(config.architectures, list) else []
    for name in listed[:1]:
        found: Any = getattr(transformers, str(name), None)
        known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if known and isinstance(config, found.config_class or ()):
            return found
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


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
    tensors = [info for info in checkpoint.tensors.values() if info.num_bytes]
    stacked = max((info.shape[0] for info in tensors if len(info.shape) == 3), default=0)
    for name in _COUNTS:
        count = getattr(text, name, None)
        if isinstance(count, int) and count > max(len(tensors), stacked):
            raise QuantizeError(
                f"{checkpoint.directory / CONFIG}: {name} is {count}, but the checkpoint has only "
                f"{len(tensors)} tensors that are not empty"
            )


def text_decoder(model: Any) -> Any:
    """The part of a model that reads text: in one that also sees or hears, beside its towers."""
    return model.get_decoder()


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The name of a module inside a model."""
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(module)]


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and module of the repeated decoder layers.

    That is the ``nn.ModuleList`` of the text decoder with most parameters.

    Raises:
        QuantizeError: the model has no ``nn.ModuleList``.
    """

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    lists = [m for m in text_decoder(model).modules() if isinstance(m, nn.ModuleList) and m]
    if not lists:
        raise QuantizeError(
            f"unsupported architecture {type(model).__name__}: it has no repeated layers"
        )
    layers = max(lists, key=size)
    return name_of(model, layers), layers


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
