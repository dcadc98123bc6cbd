"""The quantizer's errors name Python parameters; the command line spells these as flags."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qamw_kernels.errors import QamwError

OUT_OF_MEMORY = ("not enough memory", "allocate memory", "out of memory", "ALLOC_FAILED")
"""Parts of the messages that torch, safetensors and CUDA give in errors of a general type."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out, of the machine or of a GPU."""
    if isinstance(error, QamwError):
        return False
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY)


def printable(text: str) -> str:
    """The text with control characters escaped: a file's name must send none to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def shortened(text: object, max_length: int = 300) -> str:
    """The beginning of a text, such as the message of another library, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= max_length else f"{line[:max_length]} ..."


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


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Refuse a number that is too small.

    Args:
        name: of the parameter.
    Raises:
        QuantizeError: it is.
    """
    if value < minimum:
        raise QuantizeError(Option(name, value), f": expected at least {minimum}")


class EndedElsewhereError(Exception):
    """Another process of this run was the first to fail, and says why."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error of a model's own code into a message of one line.

    Errors of this project, and those that mean that memory ran out, are raised as they are.

    Args:
        what: begins the message.
    Raises:
        QuantizeError: in place of every other error.
    """
    try:
        yield
    except QamwError:  # has a message of its own
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        line = shortened(f"{type(error).__name__}: {error}")
        raise QuantizeError(f"{what}: {line}") from error
