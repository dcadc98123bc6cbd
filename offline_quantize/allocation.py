"""Which layers get how many bits: measured sensitivity in, index bits of every input group out.

To second order, the KL divergence that an error dW of a weight causes is half the mean of (g dW x^T)^2, with x the layer's input
and g the gradient of the log-likelihood of a label drawn from the model itself (the Fisher information). Error feedback
leaves in the mean ``distortion * norm_n^2 / K * trace(D)`` of it for row n, with D the block diagonal of the input's Hessian
weighted by g_n^2; one index bit more halves the distortion. So each group has one number, and bits go where they save most.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from offline_quantize.calibration import LayerRunner
from offline_quantize.feedback import DAMPING, factor
from offline_quantize.plan import Plan
from offline_quantize.structure import Linear
from qamw_kernels.codebook import INDEX_BITS

SENSITIVITY_WINDOWS = 4


def measure_sensitivities(plan: Plan, tokens: torch.Tensor, device: torch.device,
                          progress: Callable[[int, int], None] | None = None) -> list[list[float]]:
    """Sensitivity of every input group of every layer: the KL divergence, but for a common factor, per unit of distortion.

    The layers are run forwards, then backwards, one in memory at a time; the hidden states of all layers are kept.

    Args:
        tokens: [windows, T] int64.
    """
    runner = LayerRunner(plan.checkpoint, tokens, device)
    steps = 2 * len(plan.layers)

    def load(layer: int, step: int) -> None:
        runner.load(layer, plan.load_layer(layer))
        if progress:
            progress(step, steps)

    inputs = []
    for layer in range(len(plan.layers)):
        load(layer, layer)
        inputs.append(runner.hidden)
        runner.advance(layer)
        runner.unload(layer)
    gradients = _output_gradients(runner, tokens)
    sensitivities: list[list[float]] = []
    for layer in reversed(range(len(plan.layers))):
        load(layer, steps - 1 - layer)
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
            labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            gradient[i] = torch.autograd.grad(loss, hidden)[0][0].cpu()
        gradients.append(gradient)
        start += len(batch)
    for layer in runner.layers:
        del layer.forward
    return gradients


def _backward(runner: LayerRunner, index: int, groups: Sequence[Sequence[Linear]], inputs: Sequence[torch.Tensor],
              gradients: list[torch.Tensor]) -> list[float]:
    """Sensitivities of one layer's groups; ``gradients`` become those at the layer's input."""
    layer = runner.layers[index]
    prefix = f"{runner.layers_name}.{index}."
    group_of = {linear.name.removeprefix(prefix): i for i, group in enumerate(groups) for linear in group}
    hessians = [torch.zeros(g[0].num_inputs, g[0].num_inputs, device=runner.device) for g in groups]
    counts = [0] * len(groups)

    def watch(group: int, module: nn.Module) -> Any:
        assert isinstance(module, nn.Linear)
        row_energies = module.weight.square().mean(1)

        def note(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
            rows = args[0].detach().reshape(-1, module.in_features)

            def weigh(gradient: torch.Tensor) -> None:
                importance = gradient.reshape(-1, module.out_features).square() @ row_energies
                hessians[group].addmm_((rows * importance[:, None]).T, rows)

            counts[group] += len(rows)
            output.register_hook(weigh)

        return module.register_forward_hook(note)

    handles = [watch(i, layer.get_submodule(name)) for name, i in group_of.items()]
    for i, batch in enumerate(inputs):
        hidden = batch.to(runner.device).requires_grad_()
        output = runner.run(index, i, hidden)
        gradients[i] = torch.autograd.grad(output, hidden, gradients[i].to(runner.device))[0].cpu()
    for handle in handles:
        handle.remove()
    return [_feedback_error(hessian, n) for hessian, n in zip(hessians, counts, strict=True)]


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


def allocate(sensitivities: Sequence[float], sizes: Sequence[int], num_bits: float) -> list[int]:
    """Index bits of every group, so that the sum of ``sensitivity * 2 ** -bits`` is least.

    Args:
        sizes: pairs per group.
        num_bits: index bits to spend, in all.
    """
    bits = [INDEX_BITS.start] * len(sizes)
    left = num_bits - sum(INDEX_BITS.start * size for size in sizes)
    # What the next bit saves, per pair; each further bit saves half as much.
    queue = [(-s / size, i) for i, (s, size) in enumerate(zip(sensitivities, sizes, strict=True))]
    heapq.heapify(queue)
    while queue:
        saving, i = heapq.heappop(queue)
        if sizes[i] <= left:
            bits[i] += 1
            left -= sizes[i]
            if bits[i] + 1 in INDEX_BITS:
                heapq.heappush(queue, (saving / 2, i))
    return bits
