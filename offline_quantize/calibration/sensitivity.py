"""What an error of the weights costs: one pass forwards and backwards through the original model.

To second order, the KL divergence that an error dW of a weight causes is half the mean of
(g dW x^T)^2 over the tokens, with x the layer's input and g the gradient, at the layer's output, of
the log-likelihood of a label drawn from the model itself (the Fisher information). With errors that
are in proportion to the row norms and independent between rows, a token counts with its

    importance = sum over rows n of (g_n * norm_n)^2 / K

so that the Hessian to encode with is the mean of importance * x^T x. Error feedback then leaves
``distortion * trace(D)``, D the block diagonal of the factored Hessian, and this trace is the
group's sensitivity.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from offline_quantize.encoding.feedback import DAMPING, factor, pair_blocks, shrink
from offline_quantize.errors import QuantizeError, is_out_of_memory
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import text_decoder
from offline_quantize.model.products import quick_products
from offline_quantize.model.runner import BATCH, DTYPE, LayerRunner, window_dimension
from offline_quantize.model.structure import DecoderLayer, InputGroup
from offline_quantize.model.tracing import constant_layers
from offline_quantize.progress import Progress, silent
from offline_quantize.ranks import ALONE, Ranks

HESSIAN_BATCHES = 2  # of the calibration tokens: traces need fewer tokens than encoding

Cost = Callable[[torch.Tensor, int], float]
"""(Hessian [K, K] float32, tokens that it is the mean over) -> cost per unit of distortion."""


@dataclass
class Sensitivity:
    """What errors of one input group cost.

    Attributes:
        distortion_cost: KL divergence, except for a factor that all groups share, per unit of
            distortion.
        importance: [tokens] float32 with mean 1, in the order of the calibration tokens; values are
            positive or zero. None for experts: which tokens they get changes once the layers before
            them are quantized.
    """

    distortion_cost: float
    importance: torch.Tensor | None


def to_state(sensitivities: Sequence[Sequence[Sensitivity]]) -> dict[str, torch.Tensor]:
    """Sensitivities by layer and group as named tensors, for a run that is resumed."""
    state = {}
    for layer, groups in enumerate(sensitivities):
        for group, sensitivity in enumerate(groups):
            cost = torch.tensor(sensitivity.distortion_cost, dtype=torch.float64)
            state[f"{layer}.{group}.distortion_cost"] = cost
            if sensitivity.importance is not None:
                state[f"{layer}.{group}.importance"] = sensitivity.importance
    return state


def from_state(state: Mapping[str, torch.Tensor], num_layers: int) -> list[list[Sensitivity]]:
    """The sensitivities that :func:`to_state` made tensors of; an empty list for no tensors.

    Args:
        num_layers: of the model; those without groups have no tensors.
    """
    if not state:
        return []
    found: list[dict[int, Sensitivity]] = [{} for _ in range(num_layers)]
    for name, cost in state.items():
        layer, group, kind = name.split(".")
        if kind == "distortion_cost":
            importance = state.get(f"{layer}.{group}.importance")
            found[int(layer)][int(group)] = Sensitivity(float(cost), importance)
    return [[groups[group] for group in sorted(groups)] for groups in found]


def feedback_cost(hessian: torch.Tensor, num_tokens: int) -> float:
    """Trace of D: the error that feedback leaves, per unit of distortion.

    Args:
        hessian: [K, K] float32; changed in place.
        num_tokens: that it is the mean over.
    """
    if not hessian.any():
        return 0.0
    root = factor(shrink(hessian, num_tokens).double(), DAMPING)
    return float(pair_blocks(root).square().sum())


def measure_sensitivities(
    checkpoint: Checkpoint,
    layers: Sequence[DecoderLayer],
    tokens: torch.Tensor,
    device: torch.device,
    scratch: Path,
    progress: Progress = silent,
    dtype: torch.dtype = DTYPE,
    hessian_batches: int = HESSIAN_BATCHES,
    cost: Cost = feedback_cost,
    ranks: Ranks = ALONE,
) -> list[list[Sensitivity]]:
    """Sensitivity of every input group of every layer.

    One layer is in memory at a time; the hidden states of all layers are kept in a file until the
    pass backwards.

    Args:
        layers: all decoder layers of the model, with the groups to measure.
        tokens: [windows, T] int64, the same in all processes.
        scratch: directory with room for layers * tokens * hidden size values of ``dtype``.
        dtype: in which layers run.
        hessian_batches: number of batches whose inputs make the Hessians.
        cost: makes a group's ``distortion_cost`` of its Hessian.
        ranks: the processes that share the windows, and get the sensitivities of all.
    Raises:
        QuantizeError: hidden states or gradients are not finite, or the file cannot be written.
        TensorError: a tensor of the checkpoint is not finite.
    """
    own = ranks.share(len(tokens), BATCH)
    runner = LayerRunner(checkpoint, tokens[own], device, dtype)
    # Hessians are made of the same batches, whichever process has these.
    stride = max(1, -(-len(tokens) // BATCH) // hessian_batches)
    kept = [(own.start // BATCH + i) % stride == 0 for i in range(len(runner.hidden))]
    num_kept = sum(batch.numel() for batch in torch.split(tokens, BATCH)[::stride])
    steps = 3 * len(layers)  # backwards is twice the work

    def load(layer: DecoderLayer, step: int) -> None:
        runner.load(layer, layer.load(checkpoint))
        progress("sensitivity", step, steps)

    sensitivities: list[list[Sensitivity]] = []
    with tempfile.TemporaryFile(dir=scratch) as file:  # has no name, and vanishes with the process
        inputs = TensorStack(file, scratch)
        for layer in layers:
            load(layer, layer.index)
            inputs.push(runner.hidden)
            runner.advance(layer.index)
            runner.unload(layer.index)
        with quick_products(device):
            gradients = _output_gradients(runner, tokens, own)
        for layer in reversed(layers):
            load(layer, steps - 2 * (layer.index + 1))
            readings = _backward(runner, layer, inputs.pop(), gradients, kept)
            runner.unload(layer.index)
            found = _sensitivities(layer, readings, num_kept, cost, device, ranks)
            sensitivities.insert(0, found)
    progress("sensitivity", steps, steps)
    return sensitivities


class TensorStack:
    """A stack of lists of tensors, of any shapes and dtypes, in a file.

    Args:
        file: empty, opened for reading and writing.
        scratch: its directory, for messages.
    """

    def __init__(self, file: IO[bytes], scratch: Path) -> None:
        self._file, self._scratch = file, scratch
        self._starts: list[int] = []

    def push(self, tensors: list[torch.Tensor]) -> None:
        """Put a list on top.

        Raises:
            QuantizeError: it cannot be written.
        """
        self._starts.append(self._file.tell())
        try:
            torch.save(tensors, self._file)
            self._file.flush()
        except (RuntimeError, OSError) as error:  # what torch and Python make of a full disk
            if is_out_of_memory(error):
                raise
            raise QuantizeError(
                f"{self._scratch}: the hidden states of the layers could not be written there: "
                f"{error}"
            ) from None

    def pop(self) -> list[torch.Tensor]:
        """Remove the list on top, and return it."""
        start = self._starts.pop()
        self._file.seek(start)
        tensors: list[torch.Tensor] = torch.load(self._file, weights_only=True)
        self._file.truncate(start)  # an archive is read from the end of the file
        return tensors


def _output_gradients(runner: LayerRunner, tokens: torch.Tensor, own: slice) -> list[torch.Tensor]:
    """The gradient of the log-likelihood of drawn labels, at the output of the last layer.

    Labels are drawn from the model itself, the same ones whichever process draws them. For a model
    without logits, a label is a vector from a normal distribution around its last hidden states.

    Args:
        own: the windows of ``tokens`` that this process has.
    Returns:
        For every batch, in the shape of its hidden states.
    """
    generator = torch.Generator(runner.device).manual_seed(0)
    for window in tokens[: own.start]:
        _draw(runner.model, len(window), generator)
    gradients, start = [], own.start
    for batch in runner.hidden:
        dim, found = window_dimension(batch, tokens.shape[1]), []
        for states in torch.split(batch, 1, dim=dim):  # by window: the logits are large
            hidden = states.to(runner.device).requires_grad_()
            window = tokens[start : start + 1].to(runner.device)
            with constant_layers(runner.layers, runner.calls, hidden):
                loss = _drawn_loss(runner.model, window, generator)
            found.append(torch.autograd.grad(loss, hidden)[0].cpu())
            start += 1
        gradients.append(torch.cat(found, dim=dim))
    return gradients


def _drawn_loss(model: Any, window: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Minus the log-likelihood of labels drawn for a window [1, T], up to a constant."""
    drawn = _draw(model, window.shape[1], generator)
    if model.get_output_embeddings() is None:
        states = text_decoder(model)(input_ids=window, use_cache=False).last_hidden_state[0]
        loss: torch.Tensor = (states.float() * drawn).sum()
        return loss  # up to the sign, the gradient of half the squared distance
    logits = model(input_ids=window, use_cache=False).logits[0].float()
    edges = logits.detach().softmax(1).cumsum(1)  # much faster than torch.multinomial
    labels = torch.searchsorted(edges, drawn * edges[:, -1:])[:, 0].clamp_max(edges.shape[1] - 1)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def _draw(model: Any, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Random float32 for a window: uniform [T, 1] for labels, or normal [T, hidden size]."""
    if model.get_output_embeddings() is None:
        width = model.config.get_text_config().hidden_size
        return torch.randn(num_tokens, width, generator=generator, device=generator.device)
    return torch.rand(num_tokens, 1, generator=generator, device=generator.device)


@dataclass
class _Reading:
    """One run of a linear, or of several linears that read the same input.

    Attributes:
        importance: of the tokens, [n].
        inputs: the tokens [n, K]; None where they are not kept.
    """

    importance: torch.Tensor
    inputs: torch.Tensor | None


def _modules(group: InputGroup) -> dict[str, bool]:
    """Names of a group's modules -> whether the module is the first that reads its input."""
    counted = {linear.modules[0] for linear in group if linear.counted}
    return {name: name in counted for linear in group for name in linear.modules}


def _backward(
    runner: LayerRunner,
    layer: DecoderLayer,
    inputs: Sequence[torch.Tensor],
    gradients: list[torch.Tensor],
    kept: Sequence[bool],
) -> list[list[_Reading]]:
    """All runs of the linears of every group of a layer, in order.

    Args:
        inputs: of the layer, for every batch.
        gradients: at the layer's output, for every batch; replaced by those at its input.
        kept: for every batch, whether the tokens that linears read are kept.
    """
    readings: list[list[_Reading]] = [[] for _ in layer.groups]
    keep = False

    def watch(full_name: str, counted: bool, own: list[_Reading]) -> RemovableHandle:
        name = full_name.removeprefix(f"{layer.name}.")
        module = runner.layers[layer.index].get_submodule(name)
        assert isinstance(module, nn.Linear)
        energies = module.weight.float().square().mean(1)

        def record(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if counted:
                rows = args[0].detach().reshape(-1, module.in_features)
                importance = torch.zeros(len(rows), device=runner.device)
                own.append(_Reading(importance, rows if keep else None))
            # The last reading's: linears that read the same input run one after another.
            importance = own[-1].importance

            def weigh(gradient: torch.Tensor) -> None:
                squares = gradient.reshape(-1, module.out_features).float().square()
                importance.add_(squares @ energies)

            if output.requires_grad:  # not if the output only selects something
                output.register_hook(weigh)  # type: ignore[no-untyped-call]  # torch has no type

        return module.register_forward_hook(record)

    handles = [
        watch(name, counted, own)
        for group, own in zip(layer.groups, readings, strict=True)
        for name, counted in _modules(group).items()
    ]
    for i, batch in enumerate(inputs):
        keep = kept[i]
        hidden = batch.to(runner.device).requires_grad_()
        with repeatable_attention(runner.device):
            output = runner.run(layer.index, i, hidden)
        at_output = gradients[i].to(runner.device)
        with quick_products(runner.device):
            gradients[i] = torch.autograd.grad(output, hidden, at_output)[0].cpu()
    for handle in handles:
        handle.remove()
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise QuantizeError(f"{layer.name}: its gradient is not finite on the calibration text")
    return readings


def repeatable_attention(device: torch.device) -> AbstractContextManager[object]:
    """While active, attention is computed such that its gradient is the same every time.

    On GPUs, fast attention kernels sum up parts of the gradient in whatever order they are ready.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def _sensitivities(
    layer: DecoderLayer,
    readings: Sequence[list[_Reading]],
    num_tokens: int,
    cost: Cost,
    device: torch.device,
    ranks: Ranks,
) -> list[Sensitivity]:
    """Sensitivities of all groups of a layer; each process computes the costs of some.

    Args:
        readings: for every group, those of this process.
        num_tokens: of the batches whose tokens were kept, in all processes.
    """
    importance: list[torch.Tensor | None] = []
    hessians: dict[int, tuple[torch.Tensor, int]] = {}
    for number, (group, own) in enumerate(zip(layer.groups, readings, strict=True)):
        importance.append(None if group.routed else _importance(own, ranks))
        hessian = ranks.sum_(_hessian(own, group.num_inputs, num_tokens, device))
        num_rows = sum(ranks.gather(sum(len(r.inputs) for r in own if r.inputs is not None)))
        if number % ranks.count == ranks.index:
            hessians[number] = hessian, num_rows
    costs: dict[int, float] = {}
    for found in ranks.gather({number: cost(*of) for number, of in hessians.items()}):
        costs |= found
    return [Sensitivity(costs[number], tokens) for number, tokens in enumerate(importance)]


def _importance(readings: Sequence[_Reading], ranks: Ranks) -> torch.Tensor:
    """Importance of all tokens, in order, with mean 1; empty where no token reaches the group."""
    own = [reading.importance for reading in readings]
    every = ranks.cat(torch.cat(own) if own else torch.zeros(0))
    return (every / (every.mean() or 1.0)).cpu()


def _hessian(
    readings: Sequence[_Reading], num_inputs: int, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """This process's part of a Hessian [K, K], the mean over ``num_tokens``."""
    kept = [(r.inputs, r.importance) for r in readings if r.inputs is not None]
    if not kept:
        return torch.zeros(num_inputs, num_inputs, device=device)
    rows, weights = (torch.cat(parts).float() for parts in zip(*kept, strict=True))
    return (rows * (weights / num_tokens)[:, None]).T @ rows
