"""How long-running work reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, how much there is) while work goes on."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
