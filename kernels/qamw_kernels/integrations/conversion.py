"""Matrices that transformers merges or splits while loading are decoded before it does so.

transformers has converters for tensors on disk that do not become one parameter each: the matrices
of experts, which become one parameter, or a matrix that becomes several. None of the converters
knows packed weights. The classes here give them the same matrices as a plain checkpoint would, on
the device of the parameter.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.errors import TensorError
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat
from qamw_kernels.format.stacks import Slice, Stack, name_apart
from qamw_kernels.integrations.experts import are_fused_experts, is_bias, pieces, transposed

_WEIGHT = re.compile(r"(?<=\.)weight\$?$")  # how the pattern of a matrix ends
_PLAIN_OR_PACKED = f"(?:{'|'.join(('weight', *LAYER_TENSORS))})$"


def takes_matrices(converter: WeightConverter) -> bool:
    """Whether a source of a converter of transformers is the matrix of a linear layer."""
    return any(_WEIGHT.search(pattern) for pattern in converter.source_patterns)


class DecodingConverter(WeightConverter):
    """A converter of transformers that takes packed matrices as well as plain ones.

    Args:
        plain: the converter, see :func:`takes_matrices`.
        fmt: of the checkpoint.
    """

    def __init__(self, plain: WeightConverter, fmt: QamwFormat) -> None:
        # One pattern for a matrix in all its forms: the number of sources stays what it was.
        sources = [_WEIGHT.sub(_PLAIN_OR_PACKED, pattern) for pattern in plain.source_patterns]
        super().__init__(sources, list(plain.target_patterns), plain.operations)
        for option in ("scope_prefix", "base_model_prefix", "force_cpu"):
            if hasattr(plain, option):  # not every version of transformers has all
                setattr(self, option, getattr(plain, option))
        self._format = fmt
        self._names: dict[str, list[str]] = {}  # source pattern -> tensors

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        """Also record the names of the tensors, which transformers passes in natural order."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        self._names.setdefault(source_pattern, []).append(source_key)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> Any:
        """Decode, then do what transformers does with plain matrices.

        Args:
            layer_name: of the parameter; the first, if there are several.
            model: with its parameters on the meta device.
        Returns:
            Name -> value of the parameters.
        Raises:
            TensorError: see :func:`decode_checked`; or the tensors do not make the parameters.
        """
        dtype = model.get_parameter_or_buffer(layer_name).dtype
        loaded = self.materialize_tensors()
        for pattern in list(loaded):
            tensors = dict(zip(self._names[pattern], loaded.pop(pattern), strict=True))
            decoded: list[Any] = list(self._decoded(tensors, dtype))
            self.collected_tensors[pattern] = decoded
        try:
            # Without the last argument, which collects errors, transformers raises them.
            made = super().convert(layer_name, model, config)
            for name, value in made.items():
                _check_shape(model, name, value[0] if isinstance(value, list) else value)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: transformers' operations expect valid input
            names = sorted(name for names in self._names.values() for name in names)
            raise TensorError(
                f"{layer_name} cannot be made of {names[0]} ... {names[-1]}: {error}"
            ) from error
        return made

    def _decoded(
        self, tensors: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """The matrices [N, K] of the tensors; each tensor is dropped once it is used."""
        for name in list(tensors):
            module, _, suffix = name.rpartition(".")
            if suffix == "qweight":
                yield self._decoded_matrix(tensors, module, dtype)
            elif suffix not in LAYER_TENSORS:
                yield tensors.pop(name).to(dtype)

    def _decoded_matrix(
        self, tensors: dict[str, torch.Tensor], module: str, dtype: torch.dtype
    ) -> torch.Tensor:
        stored = {suffix: tensors.pop(f"{module}.{suffix}") for suffix in LAYER_TENSORS}
        # Other dtypes are refused here: some versions of transformers cast all that they read.
        return decode_checked(self._format.weight_of(module, stored), module, dtype)


def _check_shape(model: Any, name: str, value: torch.Tensor) -> None:
    expected = model.get_parameter_or_buffer(name).shape
    if value.shape != expected:
        raise ValueError(f"{name} would be {list(value.shape)}, expected {list(expected)}")


class JoinExperts(ConversionOps):
    """The matrices of all experts become one parameter of transformers' fused ones."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Join them.

        Args:
            input_dict: pattern -> matrices [N, K] of all experts in order; each pattern is for a
                piece of the parameter.
            kwargs: ``full_layer_name`` of the parameter, and ``model``.
        Returns:
            The target pattern -> the parameter [experts, ...].
        """
        parameter: str = kwargs["full_layer_name"]
        path, _, name = parameter.rpartition(".")
        fused = kwargs["model"].get_submodule(path)
        shape, turned = tuple(getattr(fused, name).shape), transposed(fused)
        matrices: dict[str, torch.Tensor] = {}
        slices: dict[str, Slice] = {}
        for pattern, (part, rows) in zip(source_patterns, pieces(fused, name), strict=True):
            for i, matrix in zip(range(shape[0]), input_dict.pop(pattern), strict=True):
                matrices[f"{i}.{part}"], slices[f"{i}.{part}"] = matrix, Slice(i, rows, turned)
        stack = Stack(parameter, shape, slices)
        for key, matrix in matrices.items():
            if tuple(matrix.shape) != stack.shape_of(key):
                raise ValueError(f"{key} is {list(matrix.shape)}, not {list(stack.shape_of(key))}")
        return {target_patterns[0]: stack.join(matrices)}


def expert_converters(model: Any, transforms: Sequence[WeightTransform]) -> list[WeightConverter]:
    """Converters for experts that plain checkpoints of a model have in one tensor.

    Quantized, every expert has tensors of its own, see :mod:`qamw_kernels.format.stacks`.

    Args:
        model: on the meta device, before any layer is replaced.
        transforms: of transformers, for plain checkpoints.
    """
    found = {}
    for path, fused in model.named_modules():
        if are_fused_experts(fused):
            for name, _ in fused.named_parameters(recurse=False):
                kind = re.sub(r"\d+", "*", path), name  # the same in every layer
                if kind not in found and not is_bias(name):
                    found[kind] = _expert_converter(model, transforms, path, name)
    converters = [converter for converter in found.values() if converter]
    return list({tuple(x.source_patterns): x for x in converters}.values())


def _expert_converter(
    model: Any, transforms: Sequence[WeightTransform], path: str, name: str
) -> WeightConverter | None:
    """The converter for one parameter of fused experts and for the same one in other layers.

    None where transformers itself reads the matrices of experts one by one.
    """
    fused = model.get_submodule(path)
    parts = [part for part, _ in pieces(fused, name)]
    tensors = list(revert_weight_conversion(model, {f"{path}.{name}": getattr(fused, name)}))
    if len(tensors) > len(parts):
        return None
    if len(tensors) < len(parts):
        tensors *= len(parts)  # one tensor has all pieces
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    base = f"{model.base_model_prefix}."  # only models with a head have this prefix
    sources, target = [], ""
    for tensor, part in zip(tensors, parts, strict=True):
        apart, _ = rename_source_key(name_apart(tensor, 0, part), renamings, [])
        block = apart.removesuffix(f".0.{part}")
        source, target = _without_layer(block.removeprefix(base), path.removeprefix(base))
        sources.append(rf"\.{re.escape(source)}\.\d+\.{re.escape(part)}")
    return WeightConverter(sources, rf"\.{target}.{name}", [JoinExperts()])


def _without_layer(one: str, other: str) -> tuple[str, str]:
    """Two names of modules without their common first parts; the last part of each stays."""
    first, second = one.split("."), other.split(".")
    same = 0
    while same < min(len(first), len(second)) - 1 and first[same] == second[same]:
        same += 1
    return ".".join(first[same:]), ".".join(second[same:])
