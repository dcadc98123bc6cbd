"""Runs a function that may hang or crash in a process of its own."""

import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Steps = Callable[[], Iterator[Any]]


class Hanging(Exception):
    """A step took longer than it may."""


class Died(Exception):
    """The process ended without a result."""


def run_isolated(steps: Steps, limit: float, max_bytes: int | None = None) -> Iterator[Any]:
    """Yield what ``steps`` yields, from a copy of this process.

    Args:
        limit: seconds that every step may take.
        max_bytes: of writable memory that they may have; None for all that there is.
    Raises:
        Hanging: a step took longer; the process was killed.
        Died: the process ended otherwise than by reaching the end of ``steps``.
    """
    context = multiprocessing.get_context("fork")  # what was imported need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(steps, sender, max_bytes))
    process.start()
    sender.close()
    try:
        while receiver.poll(limit):
            more, value = receiver.recv()
            if not more:
                return
            yield value
        raise Hanging(f"more than {limit:g} s")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise Died(f"the process ended: {how}") from None
    finally:
        process.kill()
        process.join()


def _run(steps: Steps, sender: Connection, max_bytes: int | None) -> None:
    if max_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
    for value in steps():
        sender.send((True, value))
    sender.send((False, None))
