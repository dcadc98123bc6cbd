"""Perplexity and KL divergence of a quantised checkpoint against its reference, in plain transformers."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from offline_quantize.checkpoint import Checkpoint
from offline_quantize.structure import build_empty_model, set_parameters
from qamw_kernels.codec import QuantizedWeight, decode_weight
from qamw_kernels.format import QamwFormat, layer_tensors

LOGIT_ROWS = 256  # tokens whose logits over the whole vocabulary are in memory at once


def decoded_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model that a QAM-W checkpoint stands for, quantised weights decoded and rounded to ``dtype``."""
    fmt = QamwFormat.from_dict(checkpoint.config["quantization_config"])
    suffixes = tuple(layer_tensors(1, 64, fmt.index_bits))
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            qweight, row_norms, input_scales = (t for _, t in checkpoint.load(f"{module}.{s}" for s in suffixes))
            block = fmt.rotation_block_size_of(module, len(input_scales))
            yield f"{module}.weight", decode_weight(QuantizedWeight(qweight, row_norms, input_scales, block)).to(dtype)
        elif suffix not in suffixes:
            yield from checkpoint.load([name])


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a checkpoint directory in ``dtype``, plain or QAM-W (decoded), on the CPU.

    Raises:
        ValueError: a parameter of the model has no tensor, or a tensor no parameter.
    """
    checkpoint = Checkpoint(directory)
    quantized = checkpoint.config.get("quantization_config")
    tensors = dict(decoded_tensors(checkpoint, dtype) if quantized else checkpoint.load(checkpoint.tensors))
    model = build_empty_model(directory)
    set_parameters(model, lambda name, old: tensors[name].to(dtype) if name in tensors else old, buffers=True)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    unknown = sorted(set(tensors) - set(model.state_dict()))
    if missing or unknown:
        raise ValueError(f"{directory}: no tensor for {missing[:3]}, no parameter for {unknown[:3]}")
    return model  # buffers, such as rotary frequencies, stay float32


def windows(token_ids: list[int], length: int, count: int | None = None, bos: int | None = None) -> torch.Tensor:
    """Disjoint windows [n, length (+ 1)] of a tokenised text (the GPTQ convention), each led by ``bos`` if given."""
    n = len(token_ids) // length
    tokens = torch.tensor(token_ids[: n * length]).view(n, length)[:count]
    return tokens if bos is None else torch.cat((torch.full((len(tokens), 1), bos), tokens), 1)


@dataclass
class Comparison:
    """Means over all scored tokens; KL is KL(reference || quantised) in nats over the whole vocabulary."""

    reference_perplexity: float
    perplexity: float
    kl: float
    top1_agreement: float
    num_tokens: int

    @property
    def perplexity_change_percent(self) -> float:
        return 100 * (self.perplexity / self.reference_perplexity - 1)

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {"perplexity_change_percent": self.perplexity_change_percent}


def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """exp of the mean cross-entropy of every token of ``tokens`` [n, T] given those before it in its window."""
    return compare(model, model, tokens).perplexity


@torch.no_grad()
def compare(reference: Any, quantized: Any, tokens: torch.Tensor) -> Comparison:
    """Run both models over the windows ``tokens`` [n, T]; only one window and LOGIT_ROWS rows of logits are held."""
    sums = torch.zeros(4, dtype=torch.float64)
    for window in tokens:
        states = [m.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0, :-1]
                  for m in ([reference] if reference is quantized else [reference, quantized])]
        targets = window[1:]
        for i in range(0, len(targets), LOGIT_ROWS):
            ref, quant = (torch.log_softmax(_logits(m, s[i : i + LOGIT_ROWS]).float(), -1)
                          for m, s in ((reference, states[0]), (quantized, states[-1])))
            at = targets[i : i + LOGIT_ROWS, None]
            sums += torch.stack([-ref.gather(1, at).double().sum(), -quant.gather(1, at).double().sum(),
                                 (ref.exp() * (ref - quant)).sum(1).double().sum(), (ref.argmax(1) == quant.argmax(1)).double().sum()])
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    mean = (sums / count).tolist()
    return Comparison(math.exp(mean[0]), math.exp(mean[1]), mean[2], mean[3], count)


def _logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] of last hidden states [T, H], by the model's own head with whatever scales and caps it has."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    states: Any = hidden[None]
    model.base_model.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=states)
    try:
        return model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long)).logits[0]
    finally:
        del model.base_model.forward
