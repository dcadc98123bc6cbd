"""Defaults and refusals of a request."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offline_quantize.calibration.text import DEFAULT_TEXT
from offline_quantize.errors import QuantizeError
from offline_quantize.planning.request import QuantizeRequest


def test_defaults_depend_on_calibration() -> None:
    default = QuantizeRequest()
    assert (default.bpw, default.calibration, default.tp_max) == (5.5, DEFAULT_TEXT, 8)
    assert (default.encoder, default.rates, default.mixed) == ("feedback", "mixed", True)
    plain = QuantizeRequest(calibration=None)
    assert (plain.encoder, plain.rates, plain.mixed) == ("nearest", "uniform", False)


def test_effort_is_the_default_of_the_rest() -> None:
    best = QuantizeRequest(effort="best")
    assert (best.encoder, best.rates, best.default_tokens(576)) == ("beam", "mixed", 32768)
    assert QuantizeRequest(effort="best", encoder="feedback").encoder == "feedback"
    fast = QuantizeRequest(effort="fast")
    assert (fast.encoder, fast.rates, fast.default_tokens(576)) == ("feedback", "uniform", 16384)
    with pytest.raises(QuantizeError, match="effort='most': expected one of fast, normal, best"):
        QuantizeRequest(effort="most")


def test_paths_may_be_strings_and_patterns_a_list() -> None:
    request = QuantizeRequest(calibration="some/text.txt", ignore=["*.a", "*.b"])
    assert request.calibration == Path("some/text.txt") and request.calibration_name == "text.txt"
    assert request.ignore == ("*.a", "*.b")
    assert request == replace(
        QuantizeRequest(), calibration=request.calibration, ignore=["*.a", "*.b"]
    )


@pytest.mark.parametrize(
    "values, message",
    [
        ({"bpw": 5.3}, "bpw=5.3: uniform rates must be multiples of 0.5"),
        ({"bpw": 7}, "bpw=7: expected 3 to 6, got 7"),
        ({"bpw": float("nan")}, "bpw=nan: expected 3 to 6"),
        ({"encoder": "feedback"}, "encoder='feedback' needs a calibration text"),
        ({"encoder": "best"}, "encoder='best': expected one of feedback, beam, nearest"),
        ({"encoder": "beam"}, "encoder='beam' needs a calibration text"),
        ({"effort": "best"}, "effort='best' needs a calibration text"),
        ({"rates": "mixed"}, "rates='mixed' needs a calibration text"),
        ({"rates": "good"}, "rates='good': expected one of mixed, uniform"),
        ({"calibration_tokens": 99}, "calibration_tokens=99 needs a calibration text"),
        ({"tp_max": 0}, "tp_max=0: expected at least 1"),
        ({"window_tokens": 1}, "window_tokens=1: expected at least 2"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0: expected at least 1"),
    ],
    ids=str,
)
def test_what_is_not_possible_without_calibration(values: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        QuantizeRequest(calibration=None, **values)


def test_identity_is_all_but_where_the_text_is() -> None:
    request = QuantizeRequest()
    moved = replace(request, calibration=Path("elsewhere") / DEFAULT_TEXT.name)
    assert moved.identity() == request.identity()
    changes: list[dict[str, Any]] = [
        {"bpw": 4.0},
        {"calibration": "other.txt"},
        {"encoder": "nearest"},
        {"effort": "best"},
        {"rates": "uniform"},
        {"tp_max": 4},
        {"ignore": ["*.o_proj"]},
        {"quantize_lm_head": True},
        {"max_shard_bytes": 1000},
        {"window_tokens": 128},
        {"balance_scales": False},
    ]
    for change in changes:
        assert replace(request, **change).identity() != request.identity(), change


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    """It could be neither in JSON nor in the model card."""
    request = QuantizeRequest(calibration=tmp_path / "te\udcffxt.txt")
    assert request.calibration_name == "te\ufffdxt.txt"


def test_no_tokens_are_no_calibration() -> None:
    with pytest.raises(QuantizeError, match="calibration_tokens=0: expected at least 1"):
        QuantizeRequest(calibration_tokens=0)
