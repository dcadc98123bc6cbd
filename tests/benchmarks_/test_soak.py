"""Which differences the soak test takes for a fault, and which for a tie."""

import pytest

pytest.importorskip("httpx")

from benchmarks.soak.soak import Answer, difference


def test_soak_finds_wrong_answers() -> None:
    alone = Answer(["a", "b"], [{"a": -0.5, "c": -0.6}, {"b": -0.1, "d": -3.0}])
    assert difference(alone, Answer(["a", "b"], [])) is None
    assert difference(alone, Answer(["c", "x"], [])) == "tie"
    wrong = difference(alone, Answer(["a", "d"], []))
    assert wrong is not None
    assert "token 1 is 'd', alone it was 'b', 2.900 nats" in wrong
    wrong = difference(alone, Answer(["a", "e"], []))
    assert wrong is not None and "token 1 is 'e'" in wrong
