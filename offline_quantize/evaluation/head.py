"""From last hidden states to logits, likelihoods and KL divergence, a few tokens at a time."""

from pathlib import Path
from typing import Any

import torch

from offline_quantize.checkpoints.quantized import decoded_tensors
from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.conventions import Window
from offline_quantize.evaluation.metrics import Scores
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import build_empty_model, name_of, set_parameters
from offline_quantize.model.tied import share_tensors
from offline_quantize.model.tracing import replaced_forward

# Tokens x vocabulary that are in memory at once, in each of a few float32 arrays.
LOGIT_ELEMENTS = 2**25


class Head:
    """A checkpoint's head in float32, with whatever scales and caps the model puts on logits.

    The rest of the model is never loaded. Logits are about 20: rounded to bfloat16, they would add
    noise of their own to the KL divergence.

    Args:
        directory: of a plain or QAM-W checkpoint.
        device: where logits are computed.
    Attributes:
        device: as given.
        tokens_at_once: how many tokens' logits fit into LOGIT_ELEMENTS.
    Raises:
        QuantizeError: the checkpoint has no weight for the head.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.device = device
        self._model = _load_head(directory, device)
        vocabulary = len(self._model.get_output_embeddings().weight)
        self.tokens_at_once = max(1, LOGIT_ELEMENTS // vocabulary)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] float32 of last hidden states [n, hidden size]."""
        states = hidden[None].to(self.device, torch.float32)
        output = _LastStates(states)
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        with replaced_forward([self._model.base_model], lambda _: lambda *args, **kwargs: output):
            logits: torch.Tensor = self._model(input_ids=ids).logits[0]
        return logits


class _LastStates:
    """The output of a base model: of all fields that heads ask for, only the last states."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _load_head(directory: Path, device: torch.device) -> Any:
    """The transformers model of a checkpoint, of which only the head has weights."""
    checkpoint = Checkpoint(directory)
    model, tensor_map = build_empty_model(checkpoint)
    head = model.get_output_embeddings()
    if head is None:
        raise QuantizeError(
            f"{directory}: {type(model).__name__} makes no logits, so neither perplexity nor KL "
            "divergence can be measured"
        )
    output = name_of(model, head)
    parameters = [f"{output}.{name}" for name, _ in head.named_parameters()]
    wanted = {tensor_map.tensor_of(name) for name in parameters}
    tensors = dict(decoded_tensors(checkpoint, torch.float32, wanted))
    if missing := sorted(wanted - set(tensors)):
        raise QuantizeError(f"{directory}: no tensor {missing[0]}, which the logits need")
    tensors = dict(tensor_map.parameters(tensors.items()))

    def real(name: str, old: torch.Tensor) -> torch.Tensor:
        return tensors[name].to(device, torch.float32) if name in tensors else old

    set_parameters(model, real)
    share_tensors(model, tensor_map.shared())
    return model


def _targets(head: Head, window: Window) -> torch.Tensor:
    """The scored tokens of a window [num_scored, 1] int64."""
    return torch.tensor(window.token_ids[-window.num_scored :], device=head.device)[:, None]


def token_nll(head: Head, hidden: torch.Tensor, window: Window) -> torch.Tensor:
    """Negative log-likelihood of every scored token of a window.

    Args:
        hidden: last hidden states [num_scored, hidden size].
    Returns:
        [num_scored] float32 on the CPU, in nats.
    """
    parts = []
    for states, targets in zip(
        torch.split(hidden, head.tokens_at_once),
        torch.split(_targets(head, window), head.tokens_at_once),
        strict=True,
    ):
        logits = head.logits(states)
        parts.append((logits.logsumexp(1) - logits.gather(1, targets)[:, 0]).cpu())
    return torch.cat(parts)


def compare_window(
    reference_head: Head,
    reference_hidden: torch.Tensor,
    head: Head,
    hidden: torch.Tensor,
    scores: Scores,
) -> None:
    """Score one more window of ``scores``: likelihoods, KL(reference || other), agreement.

    Args:
        reference_hidden: last hidden states [num_scored, hidden size] of the reference.
        hidden: the same of the other model.
        scores: gets the values of its first window that has none.
    """
    window = scores.windows[len(scores.nll)]
    whole = (reference_hidden, hidden, _targets(head, window))
    parts = []
    for reference_states, states, targets in zip(
        *(torch.split(tensor, head.tokens_at_once) for tensor in whole), strict=True
    ):
        reference, other = reference_head.logits(reference_states), head.logits(states)
        parts.append(_compare_logits(reference, other, targets).cpu())
    lists = (scores.reference_nll, scores.nll, scores.kl, scores.agreement)
    for values, new in zip(lists, torch.cat(parts, 1), strict=True):
        values.append(new)


def _compare_logits(
    reference: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Likelihoods, KL, agreement [4, n] from logits [n, vocabulary]; overwrites ``reference``."""
    reference_sum, other_sum = reference.logsumexp(1), other.logsumexp(1)
    agreement = reference.argmax(1) == other.argmax(1)
    reference_nll = reference_sum - reference.gather(1, targets)[:, 0]
    nll = other_sum - other.gather(1, targets)[:, 0]
    probabilities = (reference - reference_sum[:, None]).exp_()
    # In place: another array of this size would be the largest of all.
    kl = torch.linalg.vecdot(probabilities, reference.sub_(other)) - reference_sum + other_sum
    return torch.stack([reference_nll, nll, kl, agreement.float()])
