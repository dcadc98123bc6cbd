"""The estimated time of a run: what makes it longer, and how it is told."""

from pathlib import Path

import pytest

from offline_quantize.planning.duration import estimate_seconds, in_words
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest


def test_what_takes_longer_is_estimated_longer(tiny_llama: Path) -> None:
    requests = (
        QuantizeRequest(calibration=None),
        QuantizeRequest(effort="fast"),
        QuantizeRequest(),
        QuantizeRequest(quantize_lm_head=True),
        QuantizeRequest(code="trellis"),
        QuantizeRequest(effort="best"),
    )
    seconds = [estimate_seconds(make_plan(tiny_llama, request)) for request in requests]
    assert seconds == sorted(set(seconds))


@pytest.mark.parametrize(
    "seconds, words",
    [
        (59, "less than a minute"),
        (60, "about 1 minute"),
        (173, "about 3 minutes"),
        (7200, "about 2.0 hours"),
    ],
)
def test_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
