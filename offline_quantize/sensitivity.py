"""What an error of the weights costs: one pass forwards and backwards through the unquantised model.

To second order, the KL divergence that an error dW of a weight causes is half the mean of (g dW x^T)^2 over the tokens, with x the
layer's input and g the gradient, at the layer's output, of the log-likelihood of a label drawn from the model itself (the Fisher
information). With errors that are in proportion to the row norms and independent between rows, a token counts with its

    importance = sum over rows n of (g_n * norm_n)^2 / K

so that the Hessian to encode with is the mean of importance * x^T x. Error feedback then leaves ``distortion * trace(D)``, D
the block diagonal of the factored Hessian, and this trace is the group's sensitivity.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from offline_quantize.calibration import LayerRunner
from offline_quantize.errors import QuantizeError
from offline_quantize.feedback import DAMPING, factor
from offline_quantize.plan import Plan
from offline_quantize.structure import Linear

HESSIAN_BATCHES = 2  # of the calibration tokens: traces need fewer tokens than encoding


@dataclass
class Sensitivity:
    """Of one input group.

    Attributes:
        distortion_cost: KL divergence, but for a factor that all groups share, per unit of distortion.
        importance: [tokens] float32 with mean 1, in the order of the calibration tokens; what is not zero is positive.
    """

    distortion_cost: float
    importance: torch.Tensor


class _Spill:
    """A stack of lists of tensors in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._starts: list[int] = []

    def push(self, tensors: list[torch.Tensor]) -> None:
        self._starts.append(self._file.tell())
        torch.save(tensors, self._file)

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
        inputs = _Spill(file)
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
    group_of = {linear.name.removeprefix(prefix): i for i, group in enumerate(groups) for linear in group}
    importance: list[list[torch.Tensor]] = [[] for _ in groups]  # per batch
    seen: list[dict[int, torch.Tensor]] = [{} for _ in groups]  # inputs of some batches
    stride = max(1, len(inputs) // HESSIAN_BATCHES)

    def watch(group: int, name: str) -> Any:
        module = layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        energies = module.weight.float().square().mean(1)
        leads = groups[group][0].name == prefix + name

        def note(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if leads:
                at = len(importance[group])
                if at % stride == 0:
                    seen[group][at] = args[0].detach().reshape(-1, module.in_features)
                importance[group].append(torch.zeros(output[..., 0].numel(), device=runner.device))
            sums = importance[group][-1]

            def weigh(gradient: torch.Tensor) -> None:
                sums.add_(gradient.reshape(-1, module.out_features).float().square() @ energies)

            output.register_hook(weigh)

        return module.register_forward_hook(note)

    handles = [watch(i, name) for name, i in group_of.items()]
    for i, batch in enumerate(inputs):
        hidden = batch.to(runner.device).requires_grad_()
        output = runner.run(index, i, hidden)
        gradients[i] = torch.autograd.grad(output, hidden, gradients[i].to(runner.device))[0].cpu()
    for handle in handles:
        handle.remove()
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise QuantizeError(f"{prefix[:-1]}: its gradient is not finite on the calibration text")
    return [_sensitivity(*both) for both in zip(importance, seen, strict=True)]


def _sensitivity(importance: list[torch.Tensor], seen: dict[int, torch.Tensor]) -> Sensitivity:
    """From the importance of every batch, [tokens] and not yet normalised, and the inputs [tokens, K] of some."""
    if not importance:  # no token reaches the group
        return Sensitivity(0.0, torch.zeros(0))
    rows, weights = torch.cat([*seen.values()]).float(), torch.cat([importance[at] for at in seen])
    cost = _feedback_error((rows * (weights / len(rows))[:, None]).T @ rows, len(rows))
    every = torch.cat(importance)
    return Sensitivity(cost, (every / (every.mean() or 1.0)).cpu())


def _feedback_error(hessian: torch.Tensor, num_tokens: int) -> float:
    """Trace of D; what few tokens show of correlations between many inputs is believed the less, the fewer they are."""
    if not hessian.any():
        return 0.0
    diagonal = hessian.diagonal().clone()
    shrunk = hessian * (num_tokens / (num_tokens + len(hessian)))
    shrunk.diagonal().copy_(diagonal)
    root = factor(shrunk.double(), DAMPING)
    pairs = root.view(len(root) // 2, 2, -1, 2).diagonal(dim1=0, dim2=2)  # [2, 2, P]
    return float(pairs.square().sum())
