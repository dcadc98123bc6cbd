"""Errors of the quantizer name parameters of Python; the command line spells them as flags."""

from collections.abc import Callable

from qamw_kernels.errors import QamwError


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
