"""Watching a model run: what its decoder layers are called with, and what their linears read."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from offline_quantize.errors import QuantizeError, explained, is_out_of_memory
from offline_quantize.model.empty import set_parameters, text_decoder
from offline_quantize.model.experts import all_experts_run


class LayerCall(NamedTuple):
    """How the model calls a decoder layer, ``layer(hidden, *args, **kwargs)``, and what it gets.

    Attributes:
        hidden: the hidden states [batch, T, hidden size].
        args: further arguments, such as masks and rotary embeddings; they may differ by layer.
        kwargs: the same, by name.
        num_outputs: length of the tuple that the layer returns, hidden states first; 0 where it
            returns the hidden states alone.
    """

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_outputs: int = 0

    def with_outputs(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which the layer returns them."""
        return (hidden, *[None] * (self.num_outputs - 1)) if self.num_outputs else hidden


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


@contextmanager
def constant_layers(
    layers: nn.ModuleList, calls: Sequence[LayerCall], hidden: torch.Tensor
) -> Iterator[None]:
    """While active, every decoder layer puts out ``hidden``: only what follows them is run.

    Args:
        calls: one of each layer, with any input; only ``num_outputs`` is used.
    """

    def constant(index: int) -> Callable[..., Any]:
        return lambda *_, **__: calls[index].with_outputs(hidden)

    with replaced_forward(layers, constant):
        yield


class Traced(NamedTuple):
    """A decoder layer that was run without weights.

    Attributes:
        output: what it put out; the values mean nothing.
        inputs: names inside the layer of the linears that received the same tensor, in order of
            running.
    """

    output: Any
    inputs: list[list[str]]


def trace_layer(layer: nn.Module, call: LayerCall) -> Traced:
    """Run a decoder layer whose weights are on the meta device.

    Code that looks at values fails there. Then the layer runs on the CPU, where every weight is a
    single zero, expanded.
    """
    buffers = dict(layer.named_buffers())
    try:
        return _traced(layer, *tree_map_only(torch.Tensor, lambda t: t.to("meta"), call[:3]))
    except Exception as error:  # of whatever kind the model's own code raises
        if is_out_of_memory(error):
            raise
    finally:  # some code moves buffers to the device of its input
        for name, buffer in buffers.items():
            path, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(path), attribute, buffer)
    empty: set[str] = set()

    def zero(name: str, old: torch.Tensor) -> torch.Tensor:
        if not old.is_meta:
            return old
        empty.add(name)
        return torch.zeros((), dtype=old.dtype).expand(old.shape)

    set_parameters(layer, zero, buffers=True)
    traced = _traced(layer, *tree_map_only(torch.Tensor, lambda t: t.cpu(), call[:3]))
    set_parameters(layer, lambda name, t: t.to("meta") if name in empty else t, buffers=True)
    return traced


def _traced(
    layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Traced:
    by_input: dict[int, list[str]] = {}
    alive = []  # keeps ids unique while the layer runs

    def record(name: str, x: torch.Tensor) -> None:
        alive.append(x)
        by_input.setdefault(id(x), []).append(name)

    with on_linear_inputs(layer, record), torch.no_grad(), all_experts_run(layer):
        output = type(layer).forward(layer, hidden, *args, **kwargs)  # even where that is replaced
    return Traced(output, list(by_input.values()))


class Reached(Exception):
    """Ends a call of a model or of a layer early: the rest is not needed."""


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
    num_outputs: dict[type[nn.Module], int] = {}

    def recorder(index: int) -> Callable[..., Any]:
        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            order.append(index)
            call, kind = LayerCall(hidden, args, kwargs), type(layers[index])
            if kind not in num_outputs:
                output = trace_layer(layers[index], call).output
                num_outputs[kind] = len(output) if isinstance(output, tuple) else 0
            calls.append(call._replace(num_outputs=num_outputs[kind]))
            if len(calls) == len(layers):
                raise Reached
            return calls[-1].with_outputs(hidden)

        return record

    unsupported = f"unsupported architecture {type(model).__name__}"
    with (
        replaced_forward(layers, recorder),
        torch.no_grad(),
        explained(f"{unsupported}: calling it fails"),
        suppress(Reached),
    ):
        text_decoder(model)(input_ids=input_ids, use_cache=False)
    if order != list(range(len(layers))):
        raise QuantizeError(
            f"{unsupported}: its {len(layers)} decoder layers were called as {order}"
        )
    return calls


def head_input(
    model: Any, layers: nn.ModuleList, calls: Sequence[LayerCall], hidden: torch.Tensor
) -> torch.Tensor:
    """What the head reads [batch, T, K], where the decoder layers put out ``hidden``.

    Args:
        model: needs no weights in layers and head; those of the embeddings do not matter.
        calls: one of each of its layers, with any input.
        hidden: [batch, T, hidden size].
    Raises:
        QuantizeError: the model cannot be called, or does not call its head.
    """
    reads: list[torch.Tensor] = []

    def read(_: nn.Module, args: tuple[Any, ...]) -> None:
        reads.append(args[0])
        raise Reached

    unsupported = f"unsupported architecture {type(model).__name__}"
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    handle = model.get_output_embeddings().register_forward_pre_hook(read)
    with (
        constant_layers(layers, calls, hidden),
        torch.no_grad(),
        explained(f"{unsupported}: what follows its decoder layers fails"),
        suppress(Reached),
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
