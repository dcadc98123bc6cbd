"""What the soak test takes for a fault, and what for a tie."""

import pytest

pytest.importorskip("httpx")

from benchmarks.soak.soak import Answer, difference


def test_soak_sees_wrong_answers():
    alone = Answer(["a", "b"], [{"a": -0.5, "c": -0.6}, {"b": -0.1, "d": -3.0}])
    assert difference(alone, Answer(["a", "b"], [])) is None
    assert difference(alone, Answer(["c", "x"], [])) == "tie"
    assert "token 1 is 'd', alone it was 'b', 2.900 nats" in difference(alone, Answer(["a", "d"], []))
    assert "token 1 is 'e'" in difference(alone, Answer(["a", "e"], []))
