"""Another process, within limits, for work that may take any amount of memory and time.

A tokenizer or a chat template that came with a model may ask for anything. A process that runs it
may be killed when memory runs out, or never return.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

# Ordinary ones take far less: some hundred bytes and less than 10 microseconds per byte of text.
_BASE_BYTES, _BYTES_PER_BYTE = 4 * 2**30, 2**12
BASE_SECONDS, _SECONDS_PER_BYTE = 120, 1e-4


class EndedError(Exception):
    """The process ended, or was ended, before it was done; says how."""


def run_limited(
    module: str, given: Any, text_bytes: int, base_seconds: float = BASE_SECONDS
) -> bytes:
    """What ``python -m module`` writes to its standard output.

    Args:
        given: any JSON; :func:`receive` returns it in that process.
        text_bytes: of the text that it works on, which limits memory and time.
        base_seconds: time limit for an empty text.
    Raises:
        EndedError: it took too much memory or time, or ended otherwise.
    """
    num_bytes = _BASE_BYTES + _BYTES_PER_BYTE * text_bytes
    seconds = base_seconds + _SECONDS_PER_BYTE * text_bytes
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, str(num_bytes)],
            input=json.dumps(given).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        )
    except subprocess.TimeoutExpired:
        raise EndedError(f"it was stopped after {seconds:.0f} s") from None
    if code := done.returncode:
        ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        memory = f"it was allowed {num_bytes / 2**30:.1f} GiB of memory"
        raise EndedError(f"the process ended with {ended}; {memory}")
    return done.stdout


def receive() -> Any:
    """In that process: set the limits, and return what was given."""
    num_bytes = int(sys.argv[1])
    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, num_bytes)):
        with suppress(ValueError, OSError):  # a lower limit is set already
            resource.setrlimit(kind, (most, most))
    return json.load(sys.stdin.buffer)
