"""Activation statistics, one decoder layer in memory at a time, so that a model larger than memory can be calibrated."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.errors import QuantizeError
from offline_quantize.encoding.feedback import shrink
from offline_quantize.model.structure import Linear, build_empty_model, decoder_layers, on_linear_inputs, record_layer_calls, set_parameters

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")
MIN_TOKENS = 16384
TOKENS_PER_INPUT = 3  # of the widest layer: with fewer, its Hessian shows more chance than correlation
WINDOW_TOKENS = 512
BATCH = 4  # windows per forward call
DTYPE = torch.bfloat16  # as layers are served


def default_num_tokens(num_inputs: int) -> int:
    """Calibration tokens for a model whose widest layer has ``num_inputs`` inputs, where the text has so many."""
    return max(MIN_TOKENS, TOKENS_PER_INPUT * num_inputs)


def calibration_windows(directory: Path, text_file: Path, num_tokens: int, at_least: int | None = None) -> torch.Tensor:
    """Tokens [windows, WINDOW_TOKENS] int64, windows spread evenly over the text, each led by BOS if the tokenizer has one.

    Args:
        num_tokens: in all, rounded up to whole windows.
        at_least: a text with fewer than ``num_tokens`` is enough if it has so many; None for all of them.
    Raises:
        QuantizeError: the text is missing, not UTF-8, or too short; or the model has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"--calibration {text_file}: {error.strerror if isinstance(error, OSError) else error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers fail in many ways; all mean the same here
        raise QuantizeError(f"{directory}: no usable tokenizer, which calibration needs: is tokenizer.json there? ({error}) Or use "
                            "--calibration none") from None
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = WINDOW_TOKENS - len(bos)
    wanted, needed = (-(-n // WINDOW_TOKENS) for n in (num_tokens, num_tokens if at_least is None else at_least))
    if len(tokens) < needed * width:
        hint = "" if at_least is None else ", unless --calibration-tokens asks for less"
        raise QuantizeError(f"--calibration {text_file}: {len(tokens)} tokens, at least {needed * WINDOW_TOKENS} are needed{hint}")
    starts = torch.linspace(0, len(tokens) - width, min(wanted, len(tokens) // width), dtype=torch.float64).long().tolist()
    return torch.stack([torch.cat((torch.tensor(bos, dtype=torch.long), tokens[s : s + width])) for s in starts])


class LayerRunner:
    """Runs the decoder layers of a checkpoint over the calibration tokens, with one layer's weights in memory at a time.

    Layers are run in DTYPE; hidden states between two layers are kept in CPU memory.

    Attributes:
        hidden: what the next layer reads, per batch [BATCH, WINDOW_TOKENS, hidden size].
    """

    def __init__(self, checkpoint: Checkpoint, tokens: torch.Tensor, device: torch.device) -> None:
        self.device = device
        self.model = build_empty_model(checkpoint.directory)
        self.layers_name, self.layers = decoder_layers(self.model)
        self._load_outside_layers(checkpoint)
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[tuple[tuple, dict]]] = []  # per batch and layer: masks, positions
        for batch in tokens.split(BATCH):
            calls = record_layer_calls(self.model, self.layers, batch.to(device))
            self.calls.append([(args, kwargs) for _, args, kwargs in calls])
            self.hidden.append(calls[0][0].cpu())

    def _load_outside_layers(self, checkpoint: Checkpoint) -> None:
        def real(name: str, old: torch.Tensor) -> torch.Tensor:
            if name in checkpoint.tensors:  # not the head, where it is tied to the embeddings
                return next(checkpoint.load_finite([name]))[1].to(self.device, DTYPE)
            return old if old.is_meta else old.to(self.device)

        set_parameters(self.model, real, skip=self.layers_name, buffers=True)
        self.model.tie_weights()

    def load(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        """Give decoder layer ``index`` its tensors, by full name."""
        def real(name: str, old: torch.Tensor) -> torch.Tensor:
            stored = weights.get(f"{self.layers_name}.{index}.{name}")
            if stored is None:
                return old.to(self.device)
            return stored.to(self.device, DTYPE if isinstance(old, torch.nn.Parameter) else old.dtype)  # routers have biases in float32

        set_parameters(self.layers[index], real, buffers=True)

    def unload(self, index: int) -> None:
        """Let go of the tensors of decoder layer ``index``."""
        set_parameters(self.layers[index], lambda name, p: torch.empty_like(p, device="meta"))

    def run(self, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of decoder layer ``index`` for the hidden states of one batch."""
        args, kwargs = self.calls[batch][index]
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run decoder layer ``index`` over all batches, and go on to the next."""
        self.hidden = [self.run(index, i, batch.to(self.device)).cpu() for i, batch in enumerate(self.hidden)]
        if not all(batch.isfinite().all() for batch in self.hidden):
            raise QuantizeError(f"{self.layers_name}.{index}: its output is not finite on the calibration text")


class _Reached(Exception):
    """Ends the run of a layer where nothing behind is wanted."""


class Calibrator:
    """Second moments of every input group's activation, layer by layer, where each layer reads what the quantised layers
    before it put out: for every layer in turn :meth:`hessians`, then :meth:`finish`.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: torch.Tensor, device: torch.device) -> None:
        self._runner = LayerRunner(checkpoint, tokens, device)
        # Embeddings and head have done their work. All else is small, and the last norm stands before the head.
        model = self._runner.model
        done = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
        set_parameters(model, lambda name, p: torch.empty_like(p, device="meta") if id(p) in done else p, skip=self._runner.layers_name)
        self._index = 0

    @torch.no_grad()
    def hessians(self, weights: dict[str, torch.Tensor], groups: Sequence[Sequence[Linear]],
                 importance: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """Mean of importance * x^T x, [K, K] float32, over all calibration tokens that reach it, for every input x of the next layer;
        for what experts read shrunk by how few they are.

        Args:
            weights: the layer's original tensors by full name.
            importance: [tokens] float32 for each group; None where all tokens count the same.
        Returns:
            By the name of the linear that reads the input first; None where no token reached it, or nothing but zeros.
        """
        runner = self._runner
        prefix = f"{runner.layers_name}.{self._index}."
        counted = {linear.name.removeprefix(prefix): (linear, tokens) for group, tokens in zip(groups, importance, strict=True)
                   for linear in group if linear.counted}
        sums = {linear.reads: torch.zeros(linear.num_inputs, linear.num_inputs, device=runner.device) for linear, _ in counted.values()}
        counts = dict.fromkeys(sums, 0)
        last = next(reversed(counted), "")

        def note(name: str, x: torch.Tensor) -> None:
            if name in counted:
                (linear, tokens), rows = counted[name], x.reshape(-1, x.shape[-1]).float()
                weighted, at = rows, counts[linear.reads]
                if tokens is not None:
                    weighted = rows * tokens[at : at + len(rows), None].to(rows.device)
                sums[linear.reads].addmm_(weighted.T, rows)
                counts[linear.reads] += len(rows)
                if name == last and not linear.routed:
                    raise _Reached

        runner.load(self._index, weights)
        with on_linear_inputs(runner.layers[self._index], note):
            for i, batch in enumerate(runner.hidden):
                with suppress(_Reached):
                    runner.run(self._index, i, batch.to(runner.device))
        for name, total in sums.items():
            if not total.isfinite().all():
                raise QuantizeError(f"{name}: its input is not finite on the calibration text")
        reached = {name: total.div_(counts[name]) for name, total in sums.items() if counts[name] and total.any()}
        for name in {linear.reads for linear, _ in counted.values() if linear.routed} & reached.keys():
            shrink(reached[name], counts[name])
        return {name: reached.get(name) for name in sums}

    def finish(self, weights: dict[str, torch.Tensor]) -> None:
        """Carry the tokens through the layer with its quantised ``weights``, decoded, by full name; go on to the next layer."""
        self._runner.load(self._index, weights)
        self._runner.advance(self._index)
        self._runner.unload(self._index)
        self._index += 1

    @torch.no_grad()
    def head_hessian(self) -> torch.Tensor:
        """Mean of x^T x, [K, K] float32, for what the head reads; once all layers are finished."""
        runner, num_tokens = self._runner, 0
        head = runner.model.get_output_embeddings()
        total = torch.zeros(head.in_features, head.in_features, device=runner.device)

        def note(_: torch.nn.Module, args: tuple) -> None:
            rows = args[0].reshape(-1, head.in_features).float()
            total.addmm_(rows.T, rows)
            raise _Reached

        handle = head.register_forward_pre_hook(note)
        for batch in runner.hidden:
            states = batch.to(runner.device)
            for layer in runner.layers:
                layer.forward = lambda *args, states=states, **kwargs: states
            with suppress(_Reached):
                runner.model(inputs_embeds=states, use_cache=False)
            num_tokens += states[..., 0].numel()
        handle.remove()
        return total / num_tokens
