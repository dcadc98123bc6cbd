"""Perplexity and KL divergence of quantized checkpoints against their reference.

A model is split: an engine (transformers with decoded weights, or vLLM itself) computes the last
hidden states of a window, which are small; :class:`~offline_quantize.evaluation.head.Head` makes
logits of a few tokens of them at a time. Only scalars per token are kept.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from offline_quantize.checkpoints.quantized import effective_bits_per_weight
from offline_quantize.errors import Option, QuantizeError
from offline_quantize.evaluation.conventions import Text, Window, open_text
from offline_quantize.evaluation.engines import ENGINES, HiddenStates, transformers_states
from offline_quantize.evaluation.head import Head, compare_window, token_nll
from offline_quantize.evaluation.metrics import (
    CheckpointResult,
    Divergence,
    Evaluation,
    Perplexity,
    Scores,
)
from offline_quantize.evaluation.request import EvaluationRequest
from offline_quantize.files import CONFIG
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import transformers_config
from offline_quantize.progress import Progress, silent
from qamw_kernels.format.config import QUANT_METHOD


def evaluate(request: EvaluationRequest, progress: Progress = silent) -> Evaluation:
    """Measure checkpoints, quantized or plain, against a plain reference on the windows of a text.

    The reference runs once, in transformers; its last hidden states of the first convention are
    kept, in the request's dtype on the CPU.

    Args:
        progress: called with windows.
    Raises:
        QuantizeError: before any work, if text, vocabularies, tokenizers or context do not fit; or
            a checkpoint that cannot be used.
    """
    in_transformers = request.checkpoints if request.engine == "transformers" else ()
    for directory in (request.reference, *in_transformers):
        _check_decodable(directory)
    text, vocab_size = open_text(request.text, request.reference, request.bos)
    windows = {name: text.windows(name, request.windows) for name in request.conventions}
    _check_tokens(request.reference, windows, vocab_size)
    for checkpoint in request.checkpoints:
        _check_same_tokens(request.reference, text, vocab_size, checkpoint)
    bits = [effective_bits_per_weight(checkpoint) for checkpoint in request.checkpoints]

    noise_windows = windows[request.conventions[0]][: request.noise_windows]
    counter = _counter(request, windows, len(noise_windows), progress)
    head = Head(request.reference, request.device)
    noise = _noise_floor(request, head, noise_windows, counter) if noise_windows else None
    reference = _measure_reference(request, head, windows, counter)
    results = []
    for checkpoint, bits_per_weight in zip(request.checkpoints, bits, strict=True):
        start = time.monotonic()
        scores = _measure(request, checkpoint, reference, counter)
        first = scores[request.conventions[0]]
        results.append(
            CheckpointResult(
                checkpoint=str(checkpoint),
                effective_bits_per_weight=bits_per_weight,
                seconds=time.monotonic() - start,
                perplexity={name: Perplexity.of(s) for name, s in scores.items()},
                kl=Divergence.of(first),
                scores=first,
            )
        )
    return Evaluation(str(request.reference), request.conventions, text.bos, noise, results)


def _check_tokens(reference: Path, windows: dict[str, list[Window]], vocab_size: int) -> None:
    """Refuse a text with tokens for which the reference has no embedding."""
    largest = max(max(window.token_ids) for some in windows.values() for window in some)
    if largest >= vocab_size:
        raise QuantizeError(
            f"{reference}: its tokenizer produces token id {largest} from the text, "
            f"but vocab_size in config.json is {vocab_size}"
        )


def _check_decodable(directory: Path) -> None:
    """Refuse what transformers cannot run."""
    checkpoint = Checkpoint(directory)
    transformers_config(checkpoint)
    method = checkpoint.quantization.get("quant_method", QUANT_METHOD)
    if method != QUANT_METHOD and not checkpoint.encoding:
        raise QuantizeError(
            f"{directory / CONFIG}: quant_method is {method!r}, but in transformers only "
            f"{QUANT_METHOD}, plain checkpoints and those that qamw can decode are measured; "
            "measure other checkpoints with ",
            Option("engine", "vllm"),
        )


def _check_same_tokens(
    reference: Path, reference_text: Text, vocab_size: int, checkpoint: Path
) -> None:
    text, other_size = open_text(reference_text.raw, checkpoint, "auto")
    if other_size != vocab_size:
        raise QuantizeError(
            f"{checkpoint / CONFIG}: vocab_size is {other_size}, "
            f"expected {vocab_size} as in {reference}"
        )
    same_vocabulary = text.tokenizer.get_vocab() == reference_text.tokenizer.get_vocab()
    if not same_vocabulary or text.encode(text.raw) != reference_text.encode(text.raw):
        raise QuantizeError(
            f"{checkpoint}: its tokenizer splits the text into other tokens than that of "
            f"{reference}"
        )


@dataclass
class _Counter:
    """Counts the windows of all runs of all models.

    Attributes:
        total: windows of all runs. done: windows so far.
    """

    total: int
    progress: Progress
    device: torch.device
    done: int = 0

    def counted(self, states: HiddenStates) -> HiddenStates:
        """The same states; once they are exhausted, the memory of their model is free."""
        for hidden in states:
            yield hidden
            self.done += 1
            self.progress("evaluating", self.done, self.total)
        gc.collect()  # the model is gone before the next one comes
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _counter(
    request: EvaluationRequest,
    windows: dict[str, list[Window]],
    num_noise_windows: int,
    progress: Progress,
) -> _Counter:
    """The counter for the reference and every checkpoint; the noise floor takes two more runs."""
    num_windows = sum(map(len, windows.values()))
    total = num_windows * (1 + len(request.checkpoints)) + 2 * num_noise_windows
    return _Counter(total, progress, request.device)


def _noise_floor(
    request: EvaluationRequest, head: Head, windows: list[Window], counter: _Counter
) -> Scores:
    """The reference in bfloat16 against itself in float32."""

    def states(dtype: torch.dtype) -> HiddenStates:
        run = transformers_states(request.reference, windows, dtype, request.device)
        return counter.counted(run)

    scores = Scores(windows)
    exact = list(states(torch.float32))
    for expected, rounded in zip(exact, states(torch.bfloat16), strict=True):
        compare_window(head, expected, head, rounded, scores)
    return scores


@dataclass(frozen=True)
class _Reference:
    """What is kept of the reference.

    Attributes:
        head: its head.
        windows: by convention.
        states: last hidden states of the windows of the first convention, on the CPU.
        nll: likelihoods of the windows of every other convention.
    """

    head: Head
    windows: dict[str, list[Window]]
    states: list[torch.Tensor] = field(default_factory=list)
    nll: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The convention in which KL is measured."""
        return next(iter(self.windows))

    def all_windows(self) -> list[Window]:
        """The windows of all conventions, in the order in which models read them."""
        return [window for windows in self.windows.values() for window in windows]

    def labeled(self, states: HiddenStates) -> Iterator[tuple[str, Window, torch.Tensor]]:
        """(convention, window, hidden states), from the states of :meth:`all_windows`."""
        order = [(name, window) for name, some in self.windows.items() for window in some]
        for (name, window), hidden in zip(order, states, strict=True):
            yield name, window, hidden


def _measure_reference(
    request: EvaluationRequest,
    head: Head,
    windows: dict[str, list[Window]],
    counter: _Counter,
) -> _Reference:
    reference = _Reference(head, windows, nll={name: [] for name in windows})
    run = transformers_states(
        request.reference, reference.all_windows(), request.dtype, request.device
    )
    for name, window, hidden in reference.labeled(counter.counted(run)):
        if name == reference.first:
            reference.states.append(hidden.cpu())
        else:
            reference.nll[name].append(token_nll(head, hidden, window))
    return reference


def _measure(
    request: EvaluationRequest,
    checkpoint: Path,
    reference: _Reference,
    counter: _Counter,
) -> dict[str, Scores]:
    """The scores of one checkpoint, by convention."""
    head = Head(checkpoint, request.device)
    scores = {
        name: Scores(windows, list(reference.nll[name]))
        for name, windows in reference.windows.items()
    }
    engine = ENGINES[request.engine]
    run = engine(checkpoint, reference.all_windows(), request.dtype, request.device)
    for name, window, hidden in reference.labeled(counter.counted(run)):
        own = scores[name]
        if name == reference.first:
            expected = reference.states[len(own.nll)]
            compare_window(reference.head, expected, head, hidden, own)
        else:
            own.nll.append(token_nll(head, hidden, window))
    return scores
