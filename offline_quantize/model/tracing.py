"""Watching a model run: what its decoder layers are called with, and what their linears read."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from offline_quantize.errors import QuantizeError, explained


class LayerCall(NamedTuple):
    """How the model calls a decoder layer: ``layer(hidden, *args, **kwargs)``.

    Attributes:
        hidden: the hidden states [batch, T, hidden size].
        args: further arguments, as masks and rotary embeddings; they may differ by layer.
        kwargs: the same, by name.
    """

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def replaced_forward(
    modules: Iterable[nn.Module], make: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """While active, calling module number ``i`` calls ``make(i)`` in its place."""
    replaced = list(modules)
    for i, module in enumerate(replaced):
        module.forward = make(i)  # hides that of the class
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


class _Reached(Exception):
    """Ends a call of the model: what follows is not wanted."""


def record_layer_calls(
    model: Any, layers: nn.ModuleList, input_ids: torch.Tensor
) -> list[LayerCall]:
    """How the model calls each of its decoder layers on ``input_ids`` [batch, T] int64.

    The layers pass their input through, so all calls have the first one's hidden states. The
    decoder layers need no weights.

    Raises:
        QuantizeError: the model cannot be called, or does not call its layers one after the other.
    """
    calls: list[LayerCall] = []
    order: list[int] = []

    def recorder(index: int) -> Callable[..., torch.Tensor]:
        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            order.append(index)
            calls.append(LayerCall(hidden, args, kwargs))
            if len(calls) == len(layers):
                raise _Reached
            return hidden

        return record

    unsupported = f"unsupported architecture {type(model).__name__}"
    with (
        replaced_forward(layers, recorder),
        torch.no_grad(),
        explained(f"{unsupported}: calling it fails"),
        suppress(_Reached),
    ):
        model.base_model(input_ids=input_ids, use_cache=False)
    if order != list(range(len(layers))):
        raise QuantizeError(
            f"{unsupported}: its {len(layers)} decoder layers were called as {order}"
        )
    return calls


def head_input(model: Any, layers: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
    """What the head reads [batch, T, K], where the decoder layers put out ``hidden``.

    Args:
        model: needs no weights in layers and head; those of the embeddings do not matter.
        hidden: [batch, T, hidden size].
    Raises:
        QuantizeError: the model cannot be called, or does not call its head.
    """
    reads: list[torch.Tensor] = []

    def read(_: nn.Module, args: tuple[Any, ...]) -> None:
        reads.append(args[0])
        raise _Reached

    unsupported = f"unsupported architecture {type(model).__name__}"
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    handle = model.get_output_embeddings().register_forward_pre_hook(read)
    with (
        replaced_forward(layers, lambda _: lambda *args, **kwargs: hidden),
        torch.no_grad(),
        explained(f"{unsupported}: what follows its decoder layers fails"),
        suppress(_Reached),
    ):
        model(input_ids=ids, use_cache=False)
    handle.remove()
    if not reads:
        raise QuantizeError(f"{unsupported}: its head is not called")
    return reads[0]


@contextmanager
def on_linear_inputs(
    layer: nn.Module, callback: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While active, every ``nn.Linear`` of the layer first calls ``callback`` when it runs.

    Args:
        callback: is called with the linear's name inside the layer, and its input [..., K].
    """

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: callback(name, args[0])

    handles = [
        module.register_forward_pre_hook(hook_for(name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
