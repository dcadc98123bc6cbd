"""Which parameters of a model the tensors of its checkpoint hold, by transformers' own rules.

transformers renames, merges, splits and transposes tensors while it loads a checkpoint. Its own
code does that here too: with empty tensors when a :class:`TensorMap` is made, and with values once
all tensors that belong together have been read.
"""

import sys
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.tied import tied_groups
from qamw_kernels.format.config import LAYER_TENSORS, QUANT_METHOD, QamwFormat, role_of
from qamw_kernels.format.packing import unpacked_shape
from qamw_kernels.format.stacks import Stack, block_of

Shape = tuple[int, ...]
_LAST = chr(sys.maxunicode)  # sorts after anything that may follow in a name


@dataclass(frozen=True)
class Conversion:
    """Tensors that become parameters together; mostly one that is a parameter as it is.

    Attributes:
        tensors: name in the checkpoint -> shape.
        parameters: name in the model -> shape.
        sources: names of the tensors by what they are for, such as gates and ups of experts; those
            of a kind are in order.
        transform: of transformers; None where the tensor is the parameter as it is.
        model: what some transforms look at.
    """

    tensors: Mapping[str, Shape]
    parameters: Mapping[str, Shape]
    sources: tuple[tuple[str, ...], ...] = ()
    transform: Any = None
    model: Any = None

    @property
    def keeps_inputs(self) -> bool:
        """Whether a row of a tensor is a row of a parameter: rows may move, inputs do not."""
        return not self._transposing

    @property
    def transposes(self) -> bool:
        """Whether the parameter has the last two dimensions of the tensor swapped."""
        same = list(self.tensors.values()) == list(self.parameters.values())
        return any(
            not (same and getattr(operation, "check_dims", False))
            for operation in self._transposing
        )

    @property
    def _transposing(self) -> list[Any]:
        operations = getattr(self.transform, "operations", ())
        return [x for x in operations if "Transpose" in type(x).__name__]

    def apply(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values of the parameters, from those of all tensors."""
        if self.transform is None:
            (name,), (parameter,) = self.tensors, self.parameters
            return {parameter: values[name]}
        return _converted(
            self.transform, next(iter(self.parameters)), self.sources, values, self.model
        )


class TensorMap:
    """The parameters and buffers of a model, and the tensors of a checkpoint that hold them.

    Attributes:
        conversions: those for which the checkpoint has all tensors.
        expected: name -> shape, of the tensors that the model needs; those that the checkpoint
            lacks are named and shaped as transformers would save them.
        unmatched: tensors that the model does not use -> the parameter name that was looked for.
        stacks: name -> tensors that hold matrices of several parameters. A QAM-W checkpoint has
            these matrices in their place.
    """

    def __init__(self, model: Any, stored: Mapping[str, Shape]) -> None:
        """Match tensors with parameters.

        Args:
            model: of transformers, as it was built.
            stored: name -> shape of the tensors of its checkpoint, see :func:`plain_shapes`.
        """
        self._tied = tied_groups(model)
        self.stacks: dict[str, Stack] = {}
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self.conversions: list[Conversion] = []
        self.unmatched: dict[str, str] = {}
        for conversion in _conversions(model, stored, shapes, self.unmatched):
            if all(shapes.get(name) == shape for name, shape in conversion.parameters.items()):
                self.conversions.append(conversion)
            elif conversion.transform is None:  # the tensor that is meant has another shape
                (name,), (parameter,) = conversion.tensors, conversion.parameters
                whole = Conversion({name: shapes[parameter]}, {parameter: shapes[parameter]})
                self.conversions.append(whole)
        self._index()
        self.expected = {
            name: shape
            for conversion in self.conversions
            for name, shape in conversion.tensors.items()
        }
        lacking = [name for name, _ in model.named_parameters() if name not in self._of_parameter]
        shared = {name for group in self._tied for name in group if self._holder(group)}
        self.expected |= _saved(model, [name for name in lacking if name not in shared])

    def _index(self) -> None:
        self._of_parameter = {name: c for c in self.conversions for name in c.parameters}
        self._of_tensor = {name: c for c in self.conversions for name in c.tensors}
        self._stack_of = {
            part: name for name, stack in self.stacks.items() for part in stack.slices
        }
        # Sorted, to find the tensors of a layer, whose names begin alike, by bisection.
        self._by_parameter = sorted(
            (next(iter(conversion.parameters)), number, name)
            for number, (name, conversion) in enumerate(self._of_tensor.items())
        )

    def _holder(self, group: Sequence[str]) -> str | None:
        """Of parameters that are tied, the first that the checkpoint has tensors for."""
        return next((name for name in group if name in self._of_parameter), None)

    def conversion_to(self, parameter: str) -> Conversion | None:
        """What makes a parameter; None where the checkpoint lacks tensors for it, or it is tied."""
        return self._of_parameter.get(parameter)

    def tensors_of(self, prefix: str) -> list[str]:
        """Names of the tensors of parameters and buffers whose name has this prefix, in order."""
        start, end = (bisect_left(self._by_parameter, (p,)) for p in (prefix, f"{prefix}{_LAST}"))
        numbered = sorted(found[1:] for found in self._by_parameter[start:end])
        return list(dict.fromkeys(self._stack_of.get(name, name) for _, name in numbered))

    def replace(
        self, old: Sequence[Conversion], new: Sequence[Conversion], stacks: Sequence[Stack]
    ) -> None:
        """Adapt to a model in which other parameters now hold the values of the same tensors.

        Args:
            old: the conversions to parameters that were removed.
            new: the conversions to parameters that were added.
            stacks: tensors whose parts are among the tensors of ``new``.
        """
        dropped = {id(conversion) for conversion in old}
        self.conversions = [c for c in self.conversions if id(c) not in dropped]
        self.conversions += new
        self.stacks |= {stack.name: stack for stack in stacks}
        self._index()

    def shared(self) -> dict[str, str]:
        """Parameters that the checkpoint has no tensor of -> the tied one whose tensor they use."""
        found: dict[str, str] = {}
        for group in self._tied:
            holder = self._holder(group) or group[0]
            found |= {name: holder for name in group if name not in self._of_parameter}
            found.pop(holder, None)
        return found

    def tensor_of(self, parameter: str) -> str:
        """Name of the tensor with a parameter's values, or of the one that would have them."""
        parameter = self.shared().get(parameter, parameter)
        conversion = self._of_parameter.get(parameter)
        name = next(iter(conversion.tensors)) if conversion else parameter
        return self._stack_of.get(name, name)

    def stored_twice(self) -> tuple[tuple[str, str], ...]:
        """Pairs of tensors that config.json says are one, although the checkpoint has both."""
        groups = [[name for name in group if name in self._of_parameter] for group in self._tied]
        return tuple(
            (self.tensor_of(group[0]), self.tensor_of(other))
            for group in groups
            for other in group[1:]
        )

    def apart(
        self, tensors: Iterable[tuple[str, torch.Tensor]], done: Collection[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of the checkpoint, with stacks split into their parts.

        Args:
            done: names of stacks that are split already: a part may have the name of its stack.
        """
        for name, tensor in tensors:
            if name in self.stacks and name not in done:
                yield from self.stacks[name].split(tensor)
            else:
                yield name, tensor

    def parameters(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of parameters and buffers, as soon as all of their tensors are there.

        Args:
            tensors: name in the checkpoint and value, with stacks split by :meth:`apart`; tensors
                that the model does not use are skipped.
        """
        waiting: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors:
            conversion = self._of_tensor.get(name)
            if conversion is None:
                continue
            values = waiting.setdefault(id(conversion), {})
            values[name] = tensor
            if len(values) == len(conversion.tensors):
                yield from conversion.apply(waiting.pop(id(conversion))).items()


def plain_shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Name -> shape of the tensors of the model that a plain or QAM-W checkpoint stands for.

    Raises:
        FormatError: a QAM-W checkpoint whose ``quantization_config`` cannot be understood.
    """
    shapes: dict[str, Shape] = {}
    for name, info in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight" and len(info.shape) == 3:
            shapes[f"{module}.weight"] = unpacked_shape(info.shape)
        elif suffix not in LAYER_TENSORS or f"{module}.qweight" not in checkpoint.tensors:
            shapes[name] = info.shape
    if checkpoint.quantization.get("quant_method") != QUANT_METHOD:
        return shapes
    stacks = QamwFormat.from_dict(checkpoint.quantization).stacks
    blocks = tuple(block_of(name) for name in stacks)
    apart = {name for name in shapes if name.startswith(blocks) and role_of(name) != name}
    return {name: shape for name, shape in shapes.items() if name not in apart} | dict(stacks)


def _conversions(
    model: Any, stored: Mapping[str, Shape], shapes: dict[str, Shape], unmatched: dict[str, str]
) -> Iterator[Conversion]:
    """What transformers would do with the tensors of a checkpoint.

    Args:
        shapes: of the model's parameters and buffers.
        unmatched: gets the tensors that it would not use.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # slow to import
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    merged: dict[str, dict[str, list[str]]] = {}  # target -> pattern -> tensors
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, shapes
        )
        if target not in shapes and name in shapes:
            target, pattern = name, None
        if target not in shapes:
            unmatched[name] = target
        elif pattern is None:
            yield Conversion({name: stored[name]}, {target: stored[name]})
        else:
            merged.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, found in merged.items():
        transform = by_pattern[next(iter(found))]
        order = [p for p in transform.source_patterns if p in found]
        sources = tuple(tuple(found[pattern]) for pattern in order)
        tensors = {name: stored[name] for names in sources for name in names}
        empty = {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}
        try:
            converted = _converted(transform, target, sources, empty, model)
        except Exception:  # of any kind: tensors are missing, or have shapes that do not fit
            continue
        parameters = {name: tuple(tensor.shape) for name, tensor in converted.items()}
        yield Conversion(tensors, parameters, sources, transform, model)


def _converted(
    transform: Any,
    target: str,
    sources: Sequence[Sequence[str]],
    values: Mapping[str, torch.Tensor],
    model: Any,
) -> dict[str, torch.Tensor]:
    """What one transform of transformers makes of tensors."""
    transform = deepcopy(transform)
    for pattern, names in zip(transform.source_patterns, sources, strict=True):
        for name in names:
            transform.add_tensor(target, name, pattern, values[name])
    made = transform.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _saved(model: Any, parameters: Sequence[str]) -> dict[str, Shape]:
    """Name -> shape of the tensors in which transformers would save parameters."""
    from transformers.core_model_loading import revert_weight_conversion

    wanted = set(parameters)
    state = {name: t for name, t in model.state_dict().items() if name in wanted}
    if not state:
        return {}
    return {name: tuple(t.shape) for name, t in revert_weight_conversion(model, state).items()}
