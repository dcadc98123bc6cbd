"""What the decoder linears of a model in memory read, layer by layer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from offline_quantize.model.products import quick_products
from offline_quantize.model.runner import BATCH
from offline_quantize.model.structure import InputGroup, Structure
from offline_quantize.model.tracing import LayerCall, on_linear_inputs, record_layer_calls

Fold = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(statistic so far or None, inputs [rows, K] float32) -> statistic."""


def largest(so_far: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude [K] of every channel."""
    now = x.abs().amax(0)
    return now if so_far is None else torch.maximum(so_far, now)


def squares(so_far: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Sum of squares [K] of every channel."""
    now = x.square().sum(0)
    return now if so_far is None else so_far + now


def products(so_far: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Sum of outer products [K, K]: the Hessian of half the squared output error of a row."""
    return x.T @ x if so_far is None else so_far.addmm_(x.T, x)


@torch.no_grad()
def layer_statistics(
    model: Any,
    structure: Structure,
    tokens: torch.Tensor,
    fold: Fold,
) -> Iterator[list[tuple[InputGroup, torch.Tensor]]]:
    """For every decoder layer its input groups, each with the statistic of its input.

    Layers run in the model's own dtype. What the caller changes in a layer before it asks for the
    next one is seen by all later layers.

    Args:
        tokens: [n, T] int64.
    """
    layers = model.get_submodule(structure.layers_name)
    calls = [record_layer_calls(model, layers, batch) for batch in tokens.split(BATCH)]
    hidden = [batch[0].hidden for batch in calls]
    for i, (module, layer) in enumerate(zip(layers, structure.layers, strict=True)):
        readers = {group.name.removeprefix(f"{layer.name}."): group for group in layer.groups}
        statistics: dict[str, torch.Tensor] = {}

        def note(
            name: str,
            x: torch.Tensor,
            readers: dict[str, InputGroup] = readers,
            statistics: dict[str, torch.Tensor] = statistics,
        ) -> None:
            if name in readers:
                statistics[name] = fold(statistics.get(name), x.flatten(0, -2).float())

        layer_calls = [batch[i] for batch in calls]
        with on_linear_inputs(module, note):
            _run(module, hidden, layer_calls)
        yield [(readers[name], statistic) for name, statistic in statistics.items()]
        hidden = _run(module, hidden, layer_calls)


def _run(layer: Any, hidden: list[torch.Tensor], calls: list[LayerCall]) -> list[torch.Tensor]:
    """The outputs of a decoder layer for the hidden states [batch, T, hidden size] of batches."""
    with quick_products(hidden[0].device):
        pairs = zip(hidden, calls, strict=True)
        outputs = [layer(h, *call.args, **call.kwargs) for h, call in pairs]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]
