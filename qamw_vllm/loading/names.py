"""Names in two places: those of tensors in the checkpoint, those of layers in vLLM's model.

config.json uses the names of the checkpoint, so it is compared with the tensors where they are
read. A layer of vLLM looks up no name: what its model class loads into it decides.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from qamw_kernels.errors import TensorError
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat, role_of

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_NAME = re.compile(rf"([\w.]+)\.(?:{'|'.join(LAYER_TENSORS)})\b")


class NameCheck:
    """Compares tensors, by their names in the checkpoint, with what config.json says of them.

    Args:
        format: of the checkpoint.
    """

    def __init__(self, format: QamwFormat) -> None:
        self._format, self._ignore = format, frozenset(format.ignore)

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor that is not quantized as config.json says.

        Raises:
            TensorError: says how.
        """
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and role_of(module) in self._format.layer_index_bits:
            raise TensorError(f"{name}: config.json says that {module} is quantized")
        if suffix not in LAYER_TENSORS:
            return
        if module in self._ignore:
            raise TensorError(f"{name}: config.json says that {module} is not quantized")
        expected = self._format.index_bits_of(module)
        if suffix == "qweight" and tensor.shape[:1] != (expected,):
            raise TensorError(
                f"{name}: expected {expected} index bits, as config.json says, "
                f"the checkpoint has {tuple(tensor.shape)}"
            )


def unserved_layers(model: torch.nn.Module, module: str, error: str = "") -> list[str]:
    """Layers that vLLM's model has for a quantized module, but builds without quantization config.

    Args:
        module: its name in the checkpoint.
        error: vLLM's message about what is missing, which may contain the layer's name.
    """
    wanted = {module, *_NAME.findall(error)}
    places = {_place(name) for name in wanted}
    return [
        name
        for name in _layers_without_config(model)
        if _place(name) in places or any(f".{name}".endswith(f".{other}") for other in wanted)
    ]


def describe_unserved(model: torch.nn.Module, module: str, layers: Iterable[str]) -> str:
    """Why these layers of a model cannot be served quantized, and what can be done."""
    return (
        f"{module} is quantized, but vLLM's {type(model).__name__} builds "
        f"{', '.join(dict.fromkeys(layers))} without a quantization config, so it can only be "
        f"served plain: quantize again with --ignore '*.{module.rpartition('.')[2]}'"
    )


def _layers_without_config(model: torch.nn.Module) -> Iterator[str]:
    quantizable = LinearBase | ParallelLMHead | RoutedExperts
    for name, layer in model.named_modules():
        without = isinstance(layer, quantizable) and getattr(layer, "quant_config", None) is None
        if without or isinstance(layer, torch.nn.Linear):
            yield name


def _place(name: str) -> tuple[Any, ...]:
    """The numbers in a module's name (of layers, experts and so on) and its last part.

    Model classes that rename modules rarely change these.
    """
    return (*_NUMBER.findall(name), name.rpartition(".")[2])
