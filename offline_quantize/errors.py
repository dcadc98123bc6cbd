"""Errors of the quantizer name parameters of Python; the command line spells them as flags."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qamw_kernels.errors import QamwError

OUT_OF_MEMORY = ("not enough memory", "allocate memory", "out of memory", "ALLOC_FAILED")
"""What torch, safetensors and CUDA say where there is no kind of error for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing, that of the machine or of a GPU."""
    if isinstance(error, QamwError):
        return False
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY)


def printable(text: str) -> str:
    """Text that shows what is in it: no control character of a file's name reaches a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def shortened(text: object, max_length: int = 300) -> str:
    """The beginning of what others have to say, on one line."""
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


class EndedElsewhereError(Exception):
    """Another process of this run was the first to fail, and says why."""


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
    except QamwError:  # has a message of its own
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        line = shortened(f"{type(error).__name__}: {error}")
        raise QuantizeError(f"{what}: {line}") from error
