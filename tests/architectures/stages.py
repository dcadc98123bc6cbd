"""The stages that need no engine, for one architecture in one folder."""

import dataclasses
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.checkpoints.verify import verify
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import Plan, make_plan
from offline_quantize.planning.request import QuantizeRequest
from tests.architectures.build import PROMPT, Architecture, build
from tests.architectures.outcomes import NotApplicable, described

NONE = QuantizeRequest(calibration=None)
FEW_TOKENS = QuantizeRequest(calibration_tokens=512, window_tokens=64)
_LAYER = re.compile(r"(.*?)\.\d+\.")  # group 1 is the name of the list of layers


class Offline:
    """Stages by name, as methods; each finds what the earlier ones left in the folder.

    Attributes:
        kept_share: see ``Record``; None until ``plan`` has passed.
    """

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture = architecture
        self.model = folder / "model"
        self.quantized = folder / "none"
        self.few_tokens = folder / "calibrated"
        self.decoded = folder / "dequantized"
        self.kept_share: float | None = None

    @cached_property
    def _model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.architecture.class_name)

    def build(self) -> None:
        if self.architecture.unbuildable:
            raise NotApplicable(self.architecture.unbuildable)
        build(self.model, self.architecture.name)
        self._read(self.model)

    def plan(self) -> None:
        self.kept_share = kept_share(make_plan(self.model, self._wanted(NONE)))

    def none(self) -> None:
        quantize(self.model, self.quantized, self._wanted(NONE))
        verify(self.quantized)

    def dequantize(self) -> None:
        dequantize(self.quantized, self.decoded, torch.bfloat16)
        self._read(self.decoded)

    def transformers(self) -> None:
        """In bfloat16 both have the very same weights."""
        import offline_quantize.transformers_quantizer  # noqa: F401  (registers the method)

        try:
            expected = output(self._read(self.decoded))
        except Exception as error:  # whatever it is, it is not about the quantized checkpoint
            raise NotApplicable(described(error)) from error
        found = output(
            self._model_class.from_pretrained(self.quantized, dtype=torch.bfloat16).eval()
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def calibrated(self) -> None:
        quantize(self.model, self.few_tokens, self._wanted(FEW_TOKENS))
        verify(self.few_tokens)

    def _wanted(self, request: QuantizeRequest) -> QuantizeRequest:
        return dataclasses.replace(request, allow_partial=self.architecture.allow_partial)

    def _read(self, directory: Path) -> Any:
        """Load a plain checkpoint in transformers; it must have exactly the model's tensors."""
        model, found = self._model_class.from_pretrained(
            directory, dtype=torch.bfloat16, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[kind]:
                raise AssertionError(f"{kind} in transformers: {sorted(found[kind])[:3]}")
        return model.eval()


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head, for a short prompt."""
    found: torch.Tensor = model(input_ids=torch.tensor([PROMPT]), use_cache=False)[0]
    if not found.isfinite().all():
        raise ValueError("outputs are not finite")
    return found


def kept_share(plan: Plan) -> float:
    """The share of the weights in the matrices of the decoder's layers that are not quantized.

    Experts in one tensor are matrices; kernels of convolutions, with one input channel, are not.
    """
    lists = {match[1] for linear in plan.linears() if (match := _LAYER.match(linear.name))}
    weights = sum(
        math.prod(info.shape)
        for info in plan.checkpoint.tensors.values()
        if (match := _LAYER.match(info.name))
        and match[1] in lists
        and len(info.shape) > 1
        and 1 not in info.shape[1:]
    )
    return 1 - plan.num_quantized_weights / weights
