"""Messages."""

from qamw_kernels.errors import first_few


def test_long_lists_are_cut() -> None:
    assert first_few(["a", "b", "c"], 3) == "a, b, c"
    assert first_few(["a", "b", "c"], 2) == "a, b, and 1 more"
    assert first_few(["a", "b", "c"], 1, "\n  ") == "a\n  and 2 more"
