"""Values that an evaluation refuses before it looks at any file."""

import os
from pathlib import Path
from typing import Any

import pytest

from offline_quantize.calibration.documents import read_text
from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.request import EvaluationRequest


def test_paths_may_be_strings_and_conventions_count_once() -> None:
    request = EvaluationRequest("model", ["a", "b"], "text", ["lm-eval", "gptq-2048", "lm-eval"])
    assert request.reference == Path("model")
    assert request.checkpoints == (Path("a"), Path("b"))
    assert request.conventions == ("lm-eval", "gptq-2048")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conventions": ()}, "convention: expected at least one"),
        ({"conventions": ("gptq",)}, "convention='gptq': expected one of gptq-2048, hf-stride"),
        ({"bos": "maybe"}, "bos='maybe': expected one of auto, yes, no"),
        ({"engine": "onnx"}, "engine='onnx': expected one of transformers, vllm"),
        ({"windows": 0}, "windows=0: expected at least 1"),
        ({"noise_windows": -1}, "noise_windows=-1: expected at least 0"),
    ],
)
def test_values_that_are_not_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        EvaluationRequest(Path("model"), (), "text", **values)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(QuantizeError, match="the text is empty"):
        EvaluationRequest(Path("model"), (), read_text(Path(os.devnull)))
