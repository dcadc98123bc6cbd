"""Activation statistics, one decoder layer after the other.

With one layer in memory at a time, a model larger than memory can be calibrated.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch

from offline_quantize.encoding.feedback import shrink
from offline_quantize.errors import QuantizeError
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.runner import BATCH, DTYPE, LayerRunner
from offline_quantize.model.structure import DecoderLayer, Linear
from offline_quantize.model.tracing import Reached, head_input, on_linear_inputs
from offline_quantize.ranks import ALONE, Ranks


class _Sums:
    """Sums of importance * x^T x over tokens, for every input x of a decoder layer.

    Args:
        layer: whose inputs are summed.
        importance: [tokens] float32 for every group; None where all tokens count the same.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        importance: Sequence[torch.Tensor | None],
        device: torch.device,
    ) -> None:
        prefix = f"{layer.name}."
        self._counted: dict[str, tuple[Linear, torch.Tensor | None]] = {
            linear.modules[0].removeprefix(prefix): (linear, tokens)
            for group, tokens in zip(layer.groups, importance, strict=True)
            for linear in group
            if linear.counted
        }
        self._last = next(reversed(self._counted), "")
        self.sums = {
            name: torch.zeros(num_inputs, num_inputs, device=device)
            for name, num_inputs in layer.input_widths().items()
        }
        self.num_tokens = dict.fromkeys(self.sums, 0)

    def add_up(self, ranks: Ranks) -> None:
        """Replace these sums by those over all processes."""
        for total in self.sums.values():
            ranks.sum_(total)
        counts = ranks.gather(self.num_tokens)
        self.num_tokens = {name: sum(own[name] for own in counts) for name in self.sums}

    def add(self, name: str, x: torch.Tensor) -> None:
        """Add what a linear reads: its name inside the layer, and its input [..., K].

        Raises:
            Reached: nothing that comes later in the layer is counted.
        """
        if name not in self._counted:
            return
        linear, tokens = self._counted[name]
        rows = x.reshape(-1, x.shape[-1]).float()
        weighted, start = rows, self.num_tokens[linear.reads]
        if tokens is not None:
            weighted = rows * tokens[start : start + len(rows), None].to(rows.device)
        self.sums[linear.reads].addmm_(weighted.T, rows)
        self.num_tokens[linear.reads] += len(rows)
        if name == self._last and not linear.routed:
            raise Reached


class Calibrator:
    """Second moments of every input group's activation, layer by layer.

    Each layer reads the output of the quantized layers before it. For every layer in turn call
    :meth:`hessians`, then :meth:`finish`; after the last, :meth:`head_hessian`. Each of several
    processes runs a part of the tokens, and gets the moments of all tokens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype = DTYPE,
        shrink_routed: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        """Embed the tokens.

        Args:
            tokens: [windows, T] int64, the same in all processes.
            dtype: in which layers run.
            shrink_routed: whether Hessians of experts' inputs are shrunk: the fewer tokens reached
                the expert, the more.
            ranks: the processes that share the windows.
        """
        self._ranks = ranks
        self._num_windows = len(tokens)
        self._own = ranks.share(len(tokens), BATCH)
        self._runner = LayerRunner(checkpoint, tokens[self._own], device, dtype)
        self._runner.unload_embeddings_and_head()
        self._shrink_routed = shrink_routed

    @torch.no_grad()
    def hessians(
        self,
        weights: dict[str, torch.Tensor],
        layer: DecoderLayer,
        importance: Sequence[torch.Tensor | None],
    ) -> dict[str, torch.Tensor | None]:
        """Mean of importance * x^T x over the calibration tokens, for every input x of a layer.

        Args:
            weights: the layer's original tensors by full name.
            layer: the next one.
            importance: [tokens] float32 for every group; None where all tokens count the same.
        Returns:
            :attr:`Linear.reads` -> [K, K] float32; None where no token reached the linear, or
            nothing but zeros.
        Raises:
            QuantizeError: an input is not finite.
        """
        runner = self._runner
        inputs = _Sums(layer, [self._own_part(tokens) for tokens in importance], runner.device)
        runner.load(layer, weights)
        with on_linear_inputs(runner.layers[layer.index], inputs.add):
            for i, batch in enumerate(runner.hidden):
                with suppress(Reached):
                    runner.run(layer.index, i, batch.to(runner.device))
        inputs.add_up(self._ranks)
        for name, total in inputs.sums.items():
            if not total.isfinite().all():
                raise QuantizeError(f"{name}: its input is not finite on the calibration text")
        reached = {
            name: total.div_(inputs.num_tokens[name])
            for name, total in inputs.sums.items()
            if inputs.num_tokens[name] and total.any()
        }
        if self._shrink_routed:
            routed = {linear.reads for linear in layer.linears() if linear.routed}
            for name in routed & reached.keys():
                shrink(reached[name], inputs.num_tokens[name])
        return {name: reached.get(name) for name in inputs.sums}

    def _own_part(self, importance: torch.Tensor | None) -> torch.Tensor | None:
        """The importance of this process's tokens."""
        if importance is None:
            return None
        edges = (self._own.start, self._own.stop)
        start, stop = (len(importance) * edge // self._num_windows for edge in edges)
        return importance[start:stop]

    def finish(self, layer: DecoderLayer, weights: dict[str, torch.Tensor]) -> None:
        """Carry the tokens through a layer.

        Args:
            layer: the next one.
            weights: the layer's tensors by full name, quantized and decoded.
        Raises:
            QuantizeError: the layer's output is not finite.
        """
        self._runner.load(layer, weights)
        self._runner.advance(layer.index)
        self._runner.unload(layer.index)

    @torch.no_grad()
    def head_hessian(self) -> torch.Tensor | None:
        """Mean of x^T x, [K, K] float32, for what the head reads; once all layers are finished.

        Returns:
            None where it reads nothing but zeros.
        """
        runner, num_tokens = self._runner, 0
        head = runner.model.get_output_embeddings()
        total = torch.zeros(head.in_features, head.in_features, device=runner.device)
        for batch in runner.hidden:
            states = head_input(runner.model, runner.layers, runner.calls, batch.to(runner.device))
            rows = states.reshape(-1, head.in_features).float()
            total.addmm_(rows.T, rows)
            num_tokens += len(rows)
        total = self._ranks.sum_(total)
        return total / sum(self._ranks.gather(num_tokens)) if total.any() else None
