"""A model without its weights: built from config.json, and given parameters one part at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.files import CONFIG
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.experts import unfuse_experts
from offline_quantize.model.tensor_map import Shape, TensorMap, plain_shapes
from offline_quantize.model.transposed import straighten
from qamw_kernels.integrations.dtypes import kept_in_float32

# Names in config.json of the numbers of layers and experts, which have tensors of their own.
_COUNTS = frozenset(
    {
        *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "layers", "depth"),
        *("encoder_layers", "decoder_layers"),
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    }
)
# Any config.json may ask for this many of these, and of parameters: they are built in seconds.
_FEW_COUNTED, _FEW_PARAMETERS = 1000, 10_000
_PARAMETERS_PER_TENSOR = 8  # one tensor may be split into some parameters
# Any config.json may ask for weights and buffers of this size: such a model needs little memory.
_FEW_WEIGHTS, _SMALL_BUFFERS = 2**24, 2**28  # numbers, bytes
_MOST_TIMES = 2  # a model may be larger than its checkpoint: tensors can be missing, or be tied

# transformers changes settings of the whole process while it builds a model.
_BUILDING = Lock()


def transformers_config(checkpoint: Checkpoint) -> Any:
    """config.json as transformers understands it; no code of the checkpoint runs.

    Raises:
        QuantizeError: transformers refuses it, or it has far more layers or experts than the
            checkpoint has tensors.
    """
    import transformers  # slow

    _check_counts(checkpoint)
    unsupported = f"{checkpoint.directory / CONFIG}: unsupported architecture"
    model_type = checkpoint.config.get("model_type")
    if isinstance(model_type, str) and model_type not in transformers.CONFIG_MAPPING:
        raise QuantizeError(
            f"{unsupported}: model_type is {model_type!r}, expected one that transformers "
            f"{transformers.__version__} knows; a newer version may know it"
        )
    with explained(unsupported):
        return transformers.AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=False
        )


def build_empty_model(checkpoint: Checkpoint) -> tuple[Any, TensorMap]:
    """The transformers model of config.json, without weights, and the map to their tensors.

    It is of the class that config.json names. Parameters, and buffers that checkpoints have, are on
    the meta device; all other buffers hold what transformers computes for them. Experts are taken
    apart (:mod:`offline_quantize.model.experts`), and GPT-2's linear layers become ``nn.Linear``.
    No code of the checkpoint runs.

    Raises:
        QuantizeError: transformers does not know the architecture, or refuses its config.json; or
            the model would be far larger than the checkpoint.
    """
    config = transformers_config(checkpoint)
    unsupported = f"{checkpoint.directory / CONFIG}: unsupported architecture"
    model_class = _model_class(config, unsupported)
    if model_class is None:
        names = [config.model_type, *map(str, config.architectures or ())]
        raise QuantizeError(
            f"{unsupported} {' '.join(names)}: expected an architecture with a text decoder that "
            "transformers knows"
        )
    with explained(unsupported), _BUILDING:
        with torch.device("meta"), _few_parameters(checkpoint):
            model = model_class._from_config(config)
        shapes = plain_shapes(checkpoint)
        tensor_map = TensorMap(model, shapes)
        _check_weights(model, tensor_map, shapes, checkpoint)
        _compute_buffers(model, checkpoint)
        unfuse_experts(model, tensor_map)
        straighten(model, tensor_map)
    return model.eval(), tensor_map


def _model_class(config: Any, unsupported: str) -> Any:
    """The class that config.json names, or else transformers' own choice; None if it has none.

    Args:
        unsupported: begins the message.
    Raises:
        QuantizeError: it names the class of another kind of model.
    """
    import transformers

    listed = config.architectures if isinstance(config.architectures, list) else []
    for name in listed[:1]:
        found: Any = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            if isinstance(config, found.config_class or ()):
                return found
            raise QuantizeError(
                f"{unsupported}: architectures has {name}, but model_type is "
                f"{config.model_type!r}: transformers would go by the latter, and vLLM by the "
                "former"
            )
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def _check_weights(
    model: Any, tensor_map: TensorMap, shapes: Mapping[str, Shape], checkpoint: Checkpoint
) -> None:
    """Refuse a model with far more weights than its checkpoint, before anything has their size.

    Args:
        shapes: of the tensors of the checkpoint.
    Raises:
        QuantizeError: names the first tensor that has another shape than the model wants.
    """
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    num_stored = sum(math.prod(shape) for shape in shapes.values())
    if num_weights <= max(_FEW_WEIGHTS, _MOST_TIMES * num_stored):
        return
    example = next(
        (
            f": {name} has shape {list(shapes[name])}, expected {list(shape)}"
            for name, shape in tensor_map.expected.items()
            if shapes.get(name, shape) != shape
        ),
        "",
    )
    raise QuantizeError(
        f"{checkpoint.directory / CONFIG}: the model would have {num_weights / 1e6:.0f} million "
        f"weights, but the checkpoint has {num_stored / 1e6:.0f}{example}"
    )


def _compute_buffers(model: Any, checkpoint: Checkpoint) -> None:
    """Compute the buffers of a model on the meta device that no checkpoint has.

    Raises:
        QuantizeError: they would be larger than the checkpoint, so config.json is not its own.
    """
    buffers = list(model.named_non_persistent_buffers())
    num_bytes = sum(buffer.nbytes for _, buffer in buffers)
    if num_bytes > max(_SMALL_BUFFERS, _num_bytes(checkpoint)):
        raise QuantizeError(
            f"{checkpoint.directory / CONFIG}: the model would have {num_bytes / 1e9:.1f} GB of "
            f"buffers, more than the {_num_bytes(checkpoint) / 1e9:.1f} GB of the checkpoint"
        )
    for name, buffer in buffers:
        path, _, attribute = name.rpartition(".")
        real = torch.empty_like(buffer, device="cpu")
        # NaN, so that a buffer that transformers forgets is noticed.
        setattr(
            model.get_submodule(path),
            attribute,
            real.fill_(math.nan if real.is_floating_point() else 0),
        )
    for module in model.modules():
        module._is_hf_initialized = False  # it was initialized on the meta device
    model.initialize_weights()


def _num_bytes(checkpoint: Checkpoint) -> int:
    return sum(info.num_bytes for info in checkpoint.tensors.values())


def _num_tensors(checkpoint: Checkpoint) -> int:
    """Number of tensors that are not empty; a small file can have any number of empty ones."""
    return sum(info.num_bytes > 0 for info in checkpoint.tensors.values())


def _most_stacked(checkpoint: Checkpoint) -> int:
    """The most matrices of experts that one tensor may hold."""
    tensors = (info for info in checkpoint.tensors.values() if info.num_bytes)
    return max((info.shape[0] for info in tensors if len(info.shape) == 3), default=0)


def _check_counts(checkpoint: Checkpoint) -> None:
    """Refuse more layers or experts than tensors, which would take forever to build.

    All parts of config.json are checked, before transformers makes lists of such a length.
    """
    num_tensors = _num_tensors(checkpoint)
    most = max(_FEW_COUNTED, num_tensors, _most_stacked(checkpoint))
    sections: list[Any] = [checkpoint.config]
    while sections:
        for name, value in sections.pop().items():
            if isinstance(value, dict):
                sections.append(value)
            if name not in _COUNTS or not isinstance(value, int | float):
                continue
            if value > most:
                raise QuantizeError(
                    f"{checkpoint.directory / CONFIG}: {name} is {value}, but the checkpoint has "
                    f"only {num_tensors} tensors that are not empty"
                )


@contextmanager
def _few_parameters(checkpoint: Checkpoint) -> Iterator[None]:
    """While active, a model gets no more parameters than the checkpoint may have tensors for.

    :func:`_check_counts` does not know every name under which config.json may have a number.

    Raises:
        QuantizeError: it would get more.
    """
    num_tensors, count = _num_tensors(checkpoint), 0
    most = max(_FEW_PARAMETERS, _PARAMETERS_PER_TENSOR * num_tensors)

    def note(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise QuantizeError(
                f"{checkpoint.directory / CONFIG}: the model would have more than {most} "
                f"parameters, but the checkpoint has only {num_tensors} tensors that are not empty"
            )

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def loaded_dtype(model: Any, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.dtype]:
    """The dtype of a tensor in a model that is loaded in ``dtype``.

    What transformers keeps in float32 is not rounded: among it are the biases by which routers
    choose experts, and their choice depends on small differences of large values.

    Returns:
        Is called with the name of a parameter or buffer and the empty tensor in its place.
    """
    kept = kept_in_float32(model, dtype)

    def dtype_of(name: str, empty: torch.Tensor) -> torch.dtype:
        # Norms in float32 would pass float32 on to layers in bfloat16: so fails DeepSeek-V4 in
        # transformers itself.
        if kept(name) and "norm" not in name:
            return torch.float32
        if not empty.is_floating_point():  # tables of experts
            return empty.dtype
        is_parameter = isinstance(empty, nn.Parameter)
        return dtype if is_parameter else torch.promote_types(empty.dtype, dtype)

    return dtype_of


def text_decoder(model: Any) -> Any:
    """The part of a model that reads text, without the towers of one that also sees or hears."""
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
