"""One run at a time writes an output directory; the others learn at once which one it is."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from offline_quantize.errors import QuantizeError
from offline_quantize.files import LOCK, json_bytes
from qamw_kernels.errors import FileError
from qamw_kernels.files import leftovers, read_json


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only run that writes ``directory``, which is created if it is missing.

    The operating system releases the lock when the process dies, however it dies. Directories that
    were created here and are still empty at the end are removed.

    Raises:
        QuantizeError: another run holds it; names its process, machine and start.
    """
    made = _make(directory)
    file = directory / LOCK
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        message = f"{directory}: {_holder(file)} is writing to it; wait until it ends"
        raise QuantizeError(message) from None
    own = file.stat().st_ino
    try:
        with suppress(OSError):  # a full disk: it is held all the same
            file.write_bytes(json_bytes(_this_run()))
        for leftover in leftovers(directory):  # of runs that were killed: nobody else writes here
            leftover.unlink()
        yield
    finally:
        # Removed while the lock is held: a run that opened the file meanwhile notices that it was
        # deleted, and makes a new one. If the output has removed it already, a file of that name is
        # another run's.
        if file.exists() and file.stat().st_ino == own:
            file.unlink()
        lock.release()
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _make(directory: Path) -> list[Path]:
    """Make a directory and its missing parents; return what was made, the innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _this_run() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(file: Path) -> str:
    """The run that holds a lock, in words."""
    try:
        holder = read_json(file)
        process = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (FileError, KeyError):  # it has only just begun, or just ended
        return "another run"
    return f"another run ({process})"
