"""Perplexity and KL divergence of quantised checkpoints against their reference.

A model is split: an engine (transformers with decoded weights, or vLLM itself) computes the last hidden states of a window,
which are small; :class:`Head` makes logits of a few tokens of them at a time. Only scalars per token are kept.
"""

import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.evaluation.metrics import CheckpointResult, Divergence, Evaluation, Perplexity, Scores
from offline_quantize.evaluation.conventions import Bos, Text, Window
from offline_quantize.checkpoints.dequantize import decoded_tensors
from offline_quantize.errors import QuantizeError
from offline_quantize.checkpoints.verify import effective_bits_per_weight
from offline_quantize.model.structure import build_empty_model, decoder_layers, set_parameters
from qamw_kernels.format.config import QUANT_METHOD

LOGIT_ELEMENTS = 2**25  # tokens x vocabulary that are in memory at once, in each of a few float32 arrays

HiddenStates = Iterator[torch.Tensor]  # of every window: [num_scored, hidden size], after the last norm


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a checkpoint directory in ``dtype``, plain or QAM-W (decoded), on the CPU.

    Raises:
        ValueError: a parameter of the model has no tensor, or a tensor no parameter.
    """
    checkpoint = Checkpoint(directory)
    tensors = dict(decoded_tensors(checkpoint, dtype))
    model = build_empty_model(directory)
    set_parameters(model, lambda name, old: tensors[name].to(dtype) if name in tensors else old, buffers=True)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    unknown = sorted(name for name in set(tensors) - set(model.state_dict()) if not _left_out(model, name))
    faults = [f"no tensor for {missing[:3]}"] * bool(missing) + [f"no parameter for {unknown[:3]}"] * bool(unknown)
    if faults:
        raise ValueError(f"{directory}: {', '.join(faults)}")
    return model  # buffers, such as rotary frequencies, stay float32


def _left_out(model: Any, name: str) -> bool:
    """Whether transformers too leaves a tensor of a checkpoint out: old rotary tables, and layers behind the last that predict further
    tokens."""
    layers_name, layers = decoder_layers(model)
    layer = re.match(rf"{re.escape(layers_name)}\.(\d+)\.", name)
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return (name.endswith("rotary_emb.inv_freq") or (layer is not None and int(layer[1]) >= len(layers))
            or any(re.search(pattern, name) for pattern in ignored))


class Head:
    """A checkpoint's head in float32, with whatever scales and caps the model puts on logits; its body is never loaded.

    Logits are about 20: rounded to bfloat16, they would add noise of their own to the KL divergence.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        from transformers.modeling_outputs import MoeModelOutputWithPast  # heads of models with experts ask for more than others

        checkpoint = Checkpoint(directory)
        self._model = model = build_empty_model(directory)
        names = {id(module): name for name, module in model.named_modules()}
        wanted = {f"{names[id(model.get_output_embeddings())]}.{suffix}" for suffix in ("weight", "bias")}
        if model.config.get_text_config().tie_word_embeddings:
            wanted.add(f"{names[id(model.get_input_embeddings())]}.weight")
        tensors = dict(decoded_tensors(checkpoint, torch.float32, wanted))
        set_parameters(model, lambda name, old: tensors[name].to(device, torch.float32) if name in tensors else old)
        model.tie_weights()
        if model.get_output_embeddings().weight.is_meta:
            raise QuantizeError(f"{directory}: none of {sorted(wanted)} found, which the logits need")
        model.base_model.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=self._hidden)
        self._hidden: Any = None
        self.device = device
        self.rows = max(1, LOGIT_ELEMENTS // len(model.get_output_embeddings().weight))

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] in float32 of last hidden states [n, hidden size]."""
        self._hidden = hidden[None].to(self.device, torch.float32)
        return self._model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)).logits[0]


@torch.no_grad()
def transformers_states(directory: Path, windows: Sequence[Window], dtype: torch.dtype, device: torch.device) -> HiddenStates:
    """The last hidden states of a plain or QAM-W checkpoint (decoded) in transformers; the model goes with the generator."""
    model = load_model(directory, dtype).to(device).base_model
    for window in windows:
        ids = torch.tensor([window.token_ids[:-1]], device=device)
        yield model(input_ids=ids, use_cache=False).last_hidden_state[0, -window.num_scored :]


def vllm_states(directory: Path, windows: Sequence[Window], dtype: torch.dtype, device: torch.device) -> HiddenStates:
    """The same from vLLM's engine, serving the checkpoint."""
    from offline_quantize.evaluation.vllm_engine import hidden_states  # vLLM is not always there, and slow to import

    return hidden_states(directory, windows, dtype, device)


ENGINES = {"transformers": transformers_states, "vllm": vllm_states}


def _targets(head: Head, window: Window) -> torch.Tensor:
    return torch.tensor(window.token_ids[-window.num_scored :], device=head.device)[:, None]


def token_nll(head: Head, hidden: torch.Tensor, window: Window) -> torch.Tensor:
    """Negative log-likelihood [num_scored] of every scored token of a window, float32 on the CPU."""
    parts = []
    for states, targets in zip(hidden.split(head.rows), _targets(head, window).split(head.rows), strict=True):
        logits = head.logits(states)
        parts.append((logits.logsumexp(1) - logits.gather(1, targets)[:, 0]).cpu())
    return torch.cat(parts)


def compare_window(reference_head: Head, reference_hidden: torch.Tensor, head: Head, hidden: torch.Tensor, scores: Scores) -> None:
    """Score one more window of ``scores``, with KL(reference || other), from the last hidden states of both models."""
    window = scores.windows[len(scores.nll)]
    parts = []
    for reference_states, states, targets in zip(*(x.split(head.rows) for x in (reference_hidden, hidden, _targets(head, window))),
                                                 strict=True):
        reference, other = reference_head.logits(reference_states), head.logits(states)
        reference_sum, other_sum = reference.logsumexp(1), other.logsumexp(1)
        agreement = reference.argmax(1) == other.argmax(1)
        nlls = [s - z.gather(1, targets)[:, 0] for s, z in ((reference_sum, reference), (other_sum, other))]
        probabilities = (reference - reference_sum[:, None]).exp_()
        kl = torch.linalg.vecdot(probabilities, reference.sub_(other)) - reference_sum + other_sum
        parts.append(torch.stack([*nlls, kl, agreement.float()]).cpu())
    for values, new in zip((scores.reference_nll, scores.nll, scores.kl, scores.agreement), torch.cat(parts, 1), strict=True):
        values.append(new)


def read_text(path: Path) -> str:
    """A UTF-8 text file that is not empty."""
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"{path}: not a readable UTF-8 text: {error}") from None
    if not raw.strip():
        raise QuantizeError(f"{path}: the text is empty")
    return raw


def open_text(raw: str, directory: Path, bos: str) -> tuple[Text, int]:
    """The text as a checkpoint's tokenizer and config.json see it, and its vocabulary size; no weights are read."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise QuantizeError(f"{directory}: no usable config.json and tokenizer: {type(error).__name__}: {error}") from None
    context = getattr(config, "max_position_embeddings", None) or 2048  # as lm-evaluation-harness
    return Text(raw, tokenizer, Bos.choose(tokenizer, config.model_type, bos), context), config.vocab_size


def _check_decodable(directory: Path) -> None:
    quantization = Checkpoint(directory).config.get("quantization_config")
    if quantization and quantization.get("quant_method") != QUANT_METHOD:
        raise QuantizeError(f"{directory / 'config.json'}: quant_method is {quantization.get('quant_method')!r}, but in transformers only "
                            f"{QUANT_METHOD} and plain checkpoints are measured; a CKPT of another method with --engine vllm")


def _check_same_tokens(reference: Path, reference_text: Text, vocab_size: int, checkpoint: Path) -> None:
    text, other_size = open_text(reference_text.raw, checkpoint, "auto")
    if other_size != vocab_size:
        raise QuantizeError(f"{checkpoint / 'config.json'}: vocab_size is {other_size}, expected {vocab_size} as in {reference}")
    if text.tokenizer.get_vocab() != reference_text.tokenizer.get_vocab() or text.encode(text.raw) != reference_text.encode(text.raw):
        raise QuantizeError(f"{checkpoint}: its tokenizer makes other tokens of the text than that of {reference}")


def evaluate(reference: Path, checkpoints: Sequence[Path], raw: str, conventions: Sequence[str], limit: int | None = None,
             bos: str = "auto", dtype: torch.dtype = torch.bfloat16, engine: str = "transformers", device: torch.device | None = None,
             noise_windows: int = 2, progress: Callable[[int, int], None] = lambda done, total: None) -> Evaluation:
    """Measure checkpoints, quantised or plain, against a plain reference on the windows of a text.

    The reference runs once, in transformers; its last hidden states of the first convention are kept, in ``dtype`` on the CPU.

    Args:
        raw: the text. conventions: keys of ``conventions.CONVENTIONS``; KL is measured in the first.
        limit: windows per convention. bos: auto, yes or no, see ``conventions.BOS_RULE``.
        engine: what runs the checkpoints, a key of ENGINES. device: of the models (vLLM chooses its own); default the CPU.
        noise_windows: windows of the first convention for the noise floor of bfloat16; 0 for none.
        progress: called with the number of windows done and in all.
    Raises:
        QuantizeError: before any work, if text, vocabularies, tokenizers or context do not fit; or an unusable checkpoint.
    """
    device = device or torch.device("cpu")
    text, vocab_size = open_text(raw, reference, bos)
    by_convention = {name: text.windows(name, limit) for name in conventions}
    largest = max(max(window.token_ids) for windows in by_convention.values() for window in windows)
    if largest >= vocab_size:
        raise QuantizeError(f"{reference}: its tokenizer makes token {largest} of the text, but vocab_size in config.json is {vocab_size}")
    for directory in (reference, *(checkpoints if engine == "transformers" else ())):
        _check_decodable(directory)
    for checkpoint in checkpoints:
        _check_same_tokens(reference, text, vocab_size, checkpoint)
    bits = [effective_bits_per_weight(checkpoint) for checkpoint in checkpoints]
    first = by_convention[conventions[0]]
    order = [(name, window) for name, windows in by_convention.items() for window in windows]
    everything = [window for _, window in order]
    noise = Scores(first[:noise_windows]) if noise_windows else None
    done, total = 0, len(everything) * (1 + len(checkpoints)) + 2 * len(noise.windows if noise else ())

    def run(states: HiddenStates) -> HiddenStates:
        nonlocal done
        for hidden in states:
            yield hidden
            done += 1
            progress(done, total)
        gc.collect()  # the model is gone before the next one comes
        if device.type == "cuda":
            torch.cuda.empty_cache()

    reference_head = Head(reference, device)
    if noise:
        exact = list(run(transformers_states(reference, noise.windows, torch.float32, device)))
        for a, b in zip(exact, run(transformers_states(reference, noise.windows, torch.bfloat16, device)), strict=True):
            compare_window(reference_head, a, reference_head, b, noise)
    kept = []
    reference_nll: dict[str, list[torch.Tensor]] = {name: [] for name in conventions}
    for (name, window), hidden in zip(order, run(transformers_states(reference, everything, dtype, device)), strict=True):
        if name == conventions[0]:
            kept.append(hidden.cpu())
        else:
            reference_nll[name].append(token_nll(reference_head, hidden, window))

    results = []
    for checkpoint, bits_per_weight in zip(checkpoints, bits, strict=True):
        start = time.monotonic()
        head = Head(checkpoint, device)
        scores = {name: Scores(by_convention[name], list(reference_nll[name])) for name in conventions}
        for (name, window), hidden in zip(order, run(ENGINES[engine](checkpoint, everything, dtype, device)), strict=True):
            if name == conventions[0]:
                compare_window(reference_head, kept[len(scores[name].nll)], head, hidden, scores[name])
            else:
                scores[name].nll.append(token_nll(head, hidden, window))
        results.append(CheckpointResult(
            str(checkpoint), bits_per_weight, time.monotonic() - start,
            {name: Perplexity.of(s) for name, s in scores.items()}, Divergence.of(scores[conventions[0]]), scores[conventions[0]]))
    return Evaluation(str(reference), tuple(conventions), text.bos, noise, results)
