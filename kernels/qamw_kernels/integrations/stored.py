"""Which tensors the files of a checkpoint hold, and whether they are all that a model needs.

If a tensor is missing, transformers continues with random numbers. So all are checked before.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from qamw_kernels.errors import TensorError
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat, layer_tensors, role_of
from qamw_kernels.format.packing import unpacked_shape
from qamw_kernels.integrations.conversion import DecodingConverter
from qamw_kernels.integrations.linears import LINEARS

# The format's dtypes, as safetensors spells them.
_DTYPES = {torch.int32: "I32", torch.float32: "F32", torch.float16: "F16"}

Stored = Mapping[str, tuple[list[int], str]]
"""Name of a tensor -> its shape and dtype, as safetensors spells it."""


def stored_tensors(files: Iterable[str]) -> Stored:
    """All tensors in the files of a checkpoint.

    Raises:
        TensorError: one is there twice.
    """
    stored: dict[str, tuple[list[int], str]] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if name in stored:
                    raise TensorError(f"{file}: {name} is also in another file of the checkpoint")
                entry = shard.get_slice(name)
                stored[name] = entry.get_shape(), entry.get_dtype()
    return stored


def check_unpacked(stored: Stored, module: str) -> None:
    """Check that the plain matrix of a module is there.

    Raises:
        TensorError: it is not.
    """
    if f"{module}.weight" not in stored:
        raise TensorError(f"the checkpoint lacks {module}.weight")


def check_packed(
    stored: Stored, module: str, num_rows: int, num_inputs: int, index_bits: int
) -> None:
    """Check that the tensors of a packed matrix [N, K] are there, with their shapes and dtypes.

    Raises:
        TensorError: one is missing, or has another shape or dtype.
    """
    expected = layer_tensors(num_rows, num_inputs, index_bits)
    if missing := [f"{module}.{name}" for name in expected if f"{module}.{name}" not in stored]:
        raise TensorError(f"the checkpoint lacks {', '.join(missing)}")
    for name, (shape, dtype) in expected.items():
        found, wanted = stored[f"{module}.{name}"], (list(shape), _DTYPES[dtype])
        if found != wanted:
            raise TensorError(
                f"{module}.{name} is {found[1]} {found[0]}, expected {wanted[1]} {wanted[0]}"
            )


@dataclass(frozen=True)
class Destinations:
    """Where transformers puts the tensors of a checkpoint.

    Attributes:
        modules: module of the model -> its name in the checkpoint, for modules whose matrix, plain
            or packed, is neither merged nor split.
        merged: parameters that a converter makes together -> modules of the checkpoint from whose
            matrices, plain or packed, it makes them.
        filled: all parameters and buffers that there are tensors for; a packed matrix counts as
            ``weight``.
    """

    modules: dict[str, str] = field(default_factory=dict)
    merged: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)


def destinations(model: Any, stored: Stored, transforms: Iterable[WeightTransform]) -> Destinations:
    """Find out where tensors go, by transformers' own rules.

    Args:
        model: of transformers, with plain layers.
        transforms: of transformers, with :class:`DecodingConverter` where matrices are merged.
    Raises:
        TensorError: transformers merges or splits a packed matrix in a way for which there is no
            such converter.
    """
    transforms = list(transforms)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    known, prefix, found = _known_names(model), model.base_model_prefix, Destinations()
    # In the order in which transformers reads names, because some of its renamings keep state.
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # as transformers does
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            continue
        module, _, suffix = name.rpartition(".")
        if pattern is None:
            owner, _, kind = target.rpartition(".")
            found.filled.add(f"{owner}.weight" if kind in LAYER_TENSORS else target)
            if suffix in ("weight", *LAYER_TENSORS):
                found.modules[owner] = module
            continue
        converter = by_pattern[pattern]
        first, *_ = converter.target_patterns
        targets = tuple(target.replace(first, other) for other in converter.target_patterns)
        found.filled.update(targets)
        if isinstance(converter, DecodingConverter):
            found.merged.setdefault(targets, []).append(module)
        elif suffix == "qweight":
            raise TensorError(
                f"{name}: transformers merges or splits it while loading, but it is "
                "packed, so this is impossible; use qamw dequantize, or vLLM"
            )
    return found


def _known_names(model: Any) -> dict[str, bool]:
    """Parameters and buffers of a model, and those that its linear layers have when packed."""
    linears = [name for name, module in model.named_modules() if isinstance(module, LINEARS)]
    packed = {f"{name}.{tensor}" for name in linears for tensor in LAYER_TENSORS}
    return dict.fromkeys([*model.state_dict(), *packed], True)


def check_merged(model: Any, stored: Stored, found: Destinations, fmt: QamwFormat) -> None:
    """Check that the matrices to be merged are all there, as the format says.

    Raises:
        TensorError: one is missing, or a tensor of it has another shape or dtype.
        FormatError: the checkpoint has no rotation width for the inputs of one.
    """
    ignored = set(fmt.ignore)
    for parameters, modules in found.merged.items():
        num_experts = sum(len(model.get_parameter_or_buffer(name)) for name in parameters)
        for module in _of_all_experts(modules, num_experts):
            if f"{module}.qweight" not in stored and f"{module}.weight" in stored:
                continue
            if module in ignored:
                check_unpacked(stored, module)
                continue
            shape, _ = stored.get(f"{module}.qweight", ([0, 0, 1], ""))
            if len(shape) != 3:
                raise TensorError(f"{module}.qweight has shape {shape}, expected 3 dimensions")
            num_rows, num_inputs = unpacked_shape(shape)
            check_packed(stored, module, num_rows, num_inputs, fmt.index_bits_of(module))
            fmt.rotation_block_size_of(module, num_inputs)


def _of_all_experts(modules: Iterable[str], num_experts: int) -> list[str]:
    """These modules, and the same modules of all other experts, which should be there too."""
    all_modules = (
        role.replace("*", str(expert))
        for role in dict.fromkeys(map(role_of, modules))
        for expert in range(num_experts if "*" in role else 1)
    )
    return list(dict.fromkeys([*all_modules, *modules]))


def check_filled(model: Any, found: Destinations) -> None:
    """Check that there are tensors for all parameters of a model.

    Raises:
        TensorError: a parameter has none.
    """
    tied = model.all_tied_weights_keys  # name -> the parameter that it shares
    ignored = model._keys_to_ignore_on_load_missing or ()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared = {tied.get(name, name) for name in found.filled}
    objects = {id(parameters[name]) for name in found.filled & parameters.keys()}
    for name, parameter in parameters.items():
        if not (
            id(parameter) in objects
            or tied.get(name, name) in shared
            or any(re.search(pattern, name) for pattern in ignored)
        ):
            raise TensorError(f"the checkpoint lacks {name}, or the tensors that it is made of")
