"""Errors of the quantizer name parameters of Python; the command line spells them as flags."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qamw_kernels.errors import QamwError

_LONGEST_LINE = 300  # of what another library says


class Option:
    """A parameter that a message speaks of, with or without the value that it has or should have.

    Args:
        name: of the parameter, in Python.
        value: what a user passed, or could pass; left out where only the name matters.
    """

    def __init__(self, name: str, *value: object) -> None:
        self.name = name
        self.value = value

    def __str__(self) -> str:
        """The spelling of Python: ``bpw=7``."""
        values = (f"{v:g}" if isinstance(v, float) else repr(v) for v in self.value)
        return "=".join([self.name, *values])


class QuantizeError(QamwError):
    """A request that cannot be carried out.

    Args:
        parts: of the message, one after the other; an :class:`Option` for every parameter.
    """

    def __init__(self, *parts: str | Option) -> None:
        super().__init__(*parts)
        self.parts = parts

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[Option], str]) -> str:
        """The message, with every parameter as ``spell`` writes it."""
        return "".join(spell(part) if isinstance(part, Option) else part for part in self.parts)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Make one line of whatever the code of a model raises; unless memory ran out, which is none of
    its faults.

    Args:
        what: begins the message.
    Raises:
        QuantizeError: instead of any other error.
    """
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        line = " ".join(f"{type(error).__name__}: {error}".split())
        if len(line) > _LONGEST_LINE:
            line = f"{line[:_LONGEST_LINE]} ..."
        raise QuantizeError(f"{what}: {line}") from error


def out_of_memory(error: Exception) -> bool:
    """Whether Python's or torch's memory did not suffice, on the CPU or a GPU."""
    says = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in says)
    )
