"""What the decoder linears of a model in memory read, layer by layer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from offline_quantize.model.structure import Linear, Structure, on_linear_inputs, record_layer_calls

BATCH = 4  # windows per forward call

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
def layer_statistics(model: Any, structure: Structure, tokens: torch.Tensor,
                     fold: Fold) -> Iterator[list[tuple[list[Linear], torch.Tensor]]]:
    """For every decoder layer its input groups, each with the statistic of its input over ``tokens`` [n, T].

    Layers run in the model's own dtype. What the caller does to a layer before it asks for the next is seen by all later ones.
    """
    layers = model.get_submodule(structure.layers_name)
    calls = [record_layer_calls(model, layers, batch) for batch in tokens.split(BATCH)]
    hidden = [batch[0][0] for batch in calls]
    for i, (layer, groups) in enumerate(zip(layers, structure.layers, strict=True)):
        prefix = f"{structure.layers_name}.{i}."
        readers = {group[0].name.removeprefix(prefix): list(group) for group in groups}
        statistics: dict[str, torch.Tensor] = {}

        def note(name: str, x: torch.Tensor, readers: dict = readers, statistics: dict = statistics) -> None:
            if name in readers:
                statistics[name] = fold(statistics.get(name), x.flatten(0, -2).float())

        with on_linear_inputs(layer, note):
            _run(layer, i, hidden, calls)
        yield [(readers[name], statistic) for name, statistic in statistics.items()]
        hidden = _run(layer, i, hidden, calls)


def _run(layer: Any, index: int, hidden: list[torch.Tensor], calls: list[list[tuple]]) -> list[torch.Tensor]:
    outs = [layer(h, *batch[index][1], **batch[index][2]) for h, batch in zip(hidden, calls, strict=True)]
    return [out[0] if isinstance(out, tuple) else out for out in outs]
