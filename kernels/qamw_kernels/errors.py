"""Errors that a user can fix. Any other exception is a bug, and keeps its traceback."""

from collections.abc import Sequence


class QamwError(Exception):
    """A file, a tensor or a request that cannot be used as it is.

    The message names the file, tensor or parameter, what was expected and what was found.
    """


class FileError(QamwError, ValueError):
    """A file that is not there, cannot be read or is not what its name promises."""


class FormatError(QamwError, ValueError):
    """A checkpoint, or a request to write one, that the format cannot express."""


class TensorError(QamwError, ValueError):
    """A tensor that is missing, or whose values or shape cannot be used."""


def first_few(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first names for a message, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return separator.join([*names[:most], *more])
