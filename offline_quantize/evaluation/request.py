"""What an evaluation is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from offline_quantize.errors import Option, QuantizeError, check_at_least
from offline_quantize.evaluation.conventions import BOS_OPTIONS, CONVENTIONS
from offline_quantize.evaluation.engines import ENGINES


@dataclass(frozen=True)
class EvaluationRequest:
    """Checkpoints, quantized or plain, to be measured against a plain reference on a text.

    Paths may be given as strings, tuples as lists; a convention that is named twice counts once.

    Attributes:
        reference: directory of the original model.
        checkpoints: directories of what is measured.
        text: the text itself, as it is in its file.
        conventions: keys of ``conventions.CONVENTIONS``; KL is measured in the first.
        windows: at most so many per convention (lm-eval: whole pages); None for all.
        bos: auto, yes or no, see ``conventions.BOS_RULE``.
        dtype: of the models; logits are always float32.
        engine: what runs the checkpoints, a key of ``engines.ENGINES``. The reference always runs
            in transformers.
        device: of models in transformers and of the heads; vLLM chooses its own.
        noise_windows: windows of the first convention for the noise floor of bfloat16; 0 for none.
    Raises:
        QuantizeError: a value that is not allowed; names the parameter.
    """

    reference: Path
    checkpoints: tuple[Path, ...]
    text: str
    conventions: tuple[str, ...] = tuple(CONVENTIONS)
    windows: int | None = None
    bos: str = "auto"
    dtype: torch.dtype = torch.bfloat16
    engine: str = "transformers"
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it never changes)
    noise_windows: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "reference", Path(self.reference))
        object.__setattr__(self, "checkpoints", tuple(map(Path, self.checkpoints)))
        object.__setattr__(self, "conventions", tuple(dict.fromkeys(self.conventions)))
        if not self.text.strip():
            raise QuantizeError(Option("text"), ": the text is empty")
        if not self.conventions:
            raise QuantizeError(Option("convention"), ": expected at least one")
        for convention in self.conventions:
            _check_choice("convention", convention, CONVENTIONS)
        _check_choice("bos", self.bos, BOS_OPTIONS)
        _check_choice("engine", self.engine, ENGINES)
        if self.windows is not None:
            check_at_least("windows", self.windows, 1)
        check_at_least("noise_windows", self.noise_windows, 0)


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in (allowed := tuple(choices)):
        raise QuantizeError(Option(name, value), f": expected one of {', '.join(allowed)}")
