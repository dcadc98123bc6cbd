"""What an error of the weights costs: one pass forwards and backwards through the unquantised model.

To second order, the KL divergence that an error dW of a weight causes is half the mean of (g dW x^T)^2 over the tokens, with x the
layer's input and g the gradient, at the layer's output, of the log-likelihood of a label drawn from the model itself (the Fisher
information). With errors that are in proportion to the row norms and independent between rows, a token counts with its

    importance = sum over rows n of (g_n * norm_n)^2 / K

so that the Hessian to encode with is the mean of importance * x^T x. Error feedback then leaves ``distortion * trace(D)``, D
the block diagonal of the factored Hessian, and this trace is the group's sensitivity.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from offline_quantize.calibration.hessians import LayerRunner
from offline_quantize.errors import QuantizeError
from offline_quantize.encoding.feedback import DAMPING, factor, shrink
from offline_quantize.planning.plan import Plan
from offline_quantize.model.structure import Linear

HESSIAN_BATCHES = 2  # of the calibration tokens: traces need fewer tokens than encoding


@dataclass
class Sensitivity:
    """Of one input group.

    Attributes:
        distortion_cost: KL divergence, but for a factor that all groups share, per unit of distortion.
        importance: [tokens] float32 with mean 1, in the order of the calibration tokens; what is not zero is positive. None for
            experts: which tokens they see changes once the layers before them are quantised.
    """

    distortion_cost: float
    importance: torch.Tensor | None


@dataclass
class _Reading:
    """One run of a linear, or of several that read the same: the tokens' importance [n], and their inputs [n, K] where they are kept."""

    importance: torch.Tensor
    inputs: torch.Tensor | None


def to_state(sensitivities: Sequence[Sequence[Sensitivity]]) -> dict[str, torch.Tensor]:
    """Sensitivities as named tensors, for a run that is resumed."""
    state = {}
    for layer, groups in enumerate(sensitivities):
        for group, sensitivity in enumerate(groups):
            state[f"{layer}.{group}.distortion_cost"] = torch.tensor(sensitivity.distortion_cost, dtype=torch.float64)
            if sensitivity.importance is not None:
                state[f"{layer}.{group}.importance"] = sensitivity.importance
    return state


def from_state(state: Mapping[str, torch.Tensor]) -> list[list[Sensitivity]]:
    """The sensitivities that :func:`to_state` made tensors of; none of none."""
    found: dict[int, dict[int, Sensitivity]] = {}
    for name, cost in state.items():
        layer, group, kind = name.split(".")
        if kind == "distortion_cost":
            found.setdefault(int(layer), {})[int(group)] = Sensitivity(float(cost), state.get(f"{layer}.{group}.importance"))
    return [[groups[group] for group in sorted(groups)] for _, groups in sorted(found.items())]


class _Spill:
    """A stack of lists of tensors in a file of the directory ``scratch``."""

    def __init__(self, file: IO[bytes], scratch: Path) -> None:
        self._file, self._scratch = file, scratch
        self._starts: list[int] = []

    def push(self, tensors: list[torch.Tensor]) -> None:
        self._starts.append(self._file.tell())
        try:
            torch.save(tensors, self._file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise QuantizeError(f"{self._scratch}: the hidden states of the layers could not be written there: {error}") from None

    def pop(self) -> list[torch.Tensor]:
        self._file.seek(self._starts.pop())
        return torch.load(self._file, weights_only=True)


def measure_sensitivities(plan: Plan, tokens: torch.Tensor, device: torch.device, scratch: Path,
                          progress: Callable[[int, int], None] | None = None) -> list[list[Sensitivity]]:
    """Sensitivity of every input group of every layer.

    One layer is in memory at a time; the hidden states of all layers wait in a file.

    Args:
        tokens: [windows, T] int64.
        scratch: directory with room for layers * tokens * hidden size values of 2 bytes.
    Raises:
        QuantizeError: gradients are not finite.
    """
    runner = LayerRunner(plan.checkpoint, tokens, device)
    steps = 3 * len(plan.layers)  # backwards is twice the work

    def load(layer: int, step: int) -> None:
        runner.load(layer, plan.load_layer(layer))
        if progress:
            progress(step, steps)

    sensitivities: list[list[Sensitivity]] = []
    with tempfile.TemporaryFile(dir=scratch) as file:  # has no name, and vanishes with the process
        inputs = _Spill(file, scratch)
        for layer in range(len(plan.layers)):
            load(layer, layer)
            inputs.push(runner.hidden)
            runner.advance(layer)
            runner.unload(layer)
        gradients = _output_gradients(runner, tokens)
        for layer in reversed(range(len(plan.layers))):
            load(layer, steps - 2 * (layer + 1))
            sensitivities.insert(0, _backward(runner, layer, plan.layers[layer], inputs.pop(), gradients))
            runner.unload(layer)
    if progress:
        progress(steps, steps)
    return sensitivities


def _output_gradients(runner: LayerRunner, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Per batch, the gradient [batch, T, hidden size] at the last layer's output of the log-likelihood of labels drawn from the model."""
    generator = torch.Generator(runner.device).manual_seed(0)
    gradients, start = [], 0
    for batch in runner.hidden:
        gradient = torch.empty_like(batch)
        for i in range(len(batch)):  # by window: the logits are large
            hidden = batch[i : i + 1].to(runner.device).requires_grad_()
            for layer in runner.layers:
                layer.forward = lambda *args, states=hidden, **kwargs: states
            logits = runner.model(input_ids=tokens[start + i : start + i + 1].to(runner.device), use_cache=False).logits[0].float()
            edges = logits.detach().softmax(1).cumsum(1)  # much faster than torch.multinomial
            drawn = torch.rand(len(edges), 1, generator=generator, device=runner.device) * edges[:, -1:]
            labels = torch.searchsorted(edges, drawn)[:, 0].clamp_max(edges.shape[1] - 1)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            gradient[i] = torch.autograd.grad(loss, hidden)[0][0].cpu()
        gradients.append(gradient)
        start += len(batch)
    for layer in runner.layers:
        del layer.forward
    return gradients


def _backward(runner: LayerRunner, index: int, groups: Sequence[Sequence[Linear]], inputs: Sequence[torch.Tensor],
              gradients: list[torch.Tensor]) -> list[Sensitivity]:
    """Sensitivities of one layer's groups; ``gradients`` become those at the layer's input."""
    layer = runner.layers[index]
    prefix = f"{runner.layers_name}.{index}."
    readings: list[list[_Reading]] = [[] for _ in groups]
    stride, at = max(1, len(inputs) // HESSIAN_BATCHES), 0

    def watch(group: int, linear: Linear) -> Any:
        module = layer.get_submodule(linear.name.removeprefix(prefix))
        assert isinstance(module, nn.Linear)
        energies = module.weight.float().square().mean(1)

        def note(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if linear.counted:
                rows = args[0].detach().reshape(-1, module.in_features)
                readings[group].append(_Reading(torch.zeros(len(rows), device=runner.device), rows if at % stride == 0 else None))
            importance = readings[group][-1].importance  # of what was read last: linears that read the same follow each other

            def weigh(gradient: torch.Tensor) -> None:
                importance.add_(gradient.reshape(-1, module.out_features).float().square() @ energies)

            output.register_hook(weigh)

        return module.register_forward_hook(note)

    handles = [watch(i, linear) for i, group in enumerate(groups) for linear in group]
    for at, batch in enumerate(inputs):
        hidden = batch.to(runner.device).requires_grad_()
        output = runner.run(index, at, hidden)
        gradients[at] = torch.autograd.grad(output, hidden, gradients[at].to(runner.device))[0].cpu()
    for handle in handles:
        handle.remove()
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise QuantizeError(f"{prefix[:-1]}: its gradient is not finite on the calibration text")
    num_tokens = sum(batch[..., 0].numel() for batch in inputs[::stride])
    return [_sensitivity(own, num_tokens, group[0].routed) for own, group in zip(readings, groups, strict=True)]


def _sensitivity(readings: list[_Reading], num_tokens: int, routed: bool) -> Sensitivity:
    """From all that linears of a group read; ``num_tokens`` is how many tokens the batches had whose inputs were kept."""
    kept = [(reading.inputs, reading.importance) for reading in readings if reading.inputs is not None]
    if not kept:  # no token reaches the group
        return Sensitivity(0.0, None if routed else torch.zeros(0))
    rows, weights = (torch.cat(parts).float() for parts in zip(*kept, strict=True))
    cost = _feedback_error((rows * (weights / num_tokens)[:, None]).T @ rows, len(rows))
    every = torch.cat([reading.importance for reading in readings])
    return Sensitivity(cost, None if routed else (every / (every.mean() or 1.0)).cpu())


def _feedback_error(hessian: torch.Tensor, num_tokens: int) -> float:
    """Trace of D."""
    if not hessian.any():
        return 0.0
    root = factor(shrink(hessian, num_tokens).double(), DAMPING)
    pairs = root.view(len(root) // 2, 2, -1, 2).diagonal(dim1=0, dim2=2)  # [2, 2, P]
    return float(pairs.square().sum())
