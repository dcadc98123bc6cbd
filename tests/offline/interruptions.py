"""Real faults at a chosen moment, without a change to the code under test.

CPython tells audit hooks what it is about to do, and an exception raised in a hook prevents it.
"""

import functools
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qamw_kernels.files import TEMPORARY

Observer = Callable[[str, tuple[Any, ...]], None]
_observers: list[Observer] = []


class Killed(BaseException):
    """Not an Exception, so that no ``except Exception`` catches it."""


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """While active, call ``observer(event, arguments)`` for every audit event of this process."""
    _install_hook()
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@functools.cache
def _install_hook() -> None:
    """Install the hook once: an audit hook stays for the life of a process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        for observer in _observers:
            observer(event, arguments)

    sys.addaudithook(hook)


@contextmanager
def counted_writes(
    directory: Path,
    kill_at: int | None = None,
    after_rename: bool = False,
    error: BaseException | type[BaseException] = Killed,
) -> Iterator[list[str]]:
    """Collect the files below ``directory`` that get their final name, in order.

    Args:
        kill_at: number of the write at which ``error`` is raised; None for never.
        after_rename: raise once the file has its final name, not just before that.
    """
    written: list[str] = []

    def observe(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            source, target = (Path(os.fsdecode(path)) for path in arguments[:2])
            if source.name.endswith(TEMPORARY) and target.is_relative_to(directory):
                if len(written) == kill_at and not after_rename:
                    raise error
                written.append(target.relative_to(directory).as_posix())
        elif event == "open" and after_rename and len(written) - 1 == kill_at:
            # The renamed file's folder is opened next, to be synced.
            assert Path(os.fsdecode(arguments[0])) == (directory / written[-1]).parent
            raise error

    with observed(observe):
        yield written


@contextmanager
def error_when_opened(path: Path, error: BaseException) -> Iterator[None]:
    """While active, opening ``path`` raises ``error``."""

    def observe(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(path):
            raise error

    with observed(observe):
        yield


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """While active, no file can grow beyond ``num_bytes``: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
