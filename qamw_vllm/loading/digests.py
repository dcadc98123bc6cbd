"""SHA-256 of a directory's files, each computed once on this machine.

Hashing a checkpoint takes about as long as reading it, engines are started often, and each of their
workers checks the files again. So digests are kept in vLLM's cache, by path and stamp.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from vllm.logger import init_logger

from qamw_kernels.errors import FileError
from qamw_kernels.files import Stamp, hash_file, read_json, write_atomically

logger = init_logger(f"vllm.{__name__}")

_MOST_THREADS = 16


class Digests:
    """Digests of the files of one directory.

    Args:
        known: file name -> its stamp and digest, from before.

    Attributes:
        known: the same, and the files hashed since.
        num_hashed: number of files hashed since.
    """

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known
        self.num_hashed = 0

    def of(self, directory: Path, files: Sequence[str]) -> list[str]:
        """SHA-256 of these files, in hexadecimal, in this order.

        Raises:
            FileError: one of them cannot be read.
        """
        # hashlib releases the GIL. Large files first, so that none of them runs alone at the end.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        order = sorted(files, key=lambda file: -(directory / file).stat().st_size)
        with ThreadPoolExecutor(min(cores, _MOST_THREADS)) as pool:
            digests = list(pool.map(lambda file: self._of_file(directory, file), order))
        self.num_hashed += sum(hashed for _, hashed in digests)
        found = dict(zip(order, digests, strict=True))
        return [found[file][0] for file in files]

    def _of_file(self, directory: Path, file: str) -> tuple[str, bool]:
        """The digest, and whether it was computed now."""
        stamp = asdict(Stamp.of((directory / file).stat()))
        known = self.known.get(file)
        digest = str(known.get("sha256")) if isinstance(known, dict) else ""
        if known == {**stamp, "sha256": digest}:
            return digest, False
        digest, hashed = hash_file(directory / file)
        if hashed is not None:  # else the file changed while it was read
            self.known[file] = {**asdict(hashed), "sha256": digest}
        return digest, True


@contextmanager
def remembered_digests(cache: Path, directory: Path) -> Iterator[Digests]:
    """The digests of a directory, for one process at a time; those that wait find them cached.

    If the cache is damaged or cannot be written, the files are hashed again.

    Args:
        cache: a folder of this machine; made where it is not there.
    """
    directory = directory.resolve()
    stem = cache / hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]
    memory = stem.with_suffix(".json")
    with ExitStack() as stack:
        usable = True
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(stem.with_suffix(".lock")))
        except OSError as error:
            usable = False
            _warn(cache, error)
        digests = Digests(_read(memory, directory) if usable else {})
        yield digests
        if usable and digests.num_hashed:  # also of files that will be refused
            _write(memory, directory, digests.known)


def _read(path: Path, directory: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileError:
        return {}
    files = content.get("files")
    return files if content.get("directory") == str(directory) and isinstance(files, dict) else {}


def _write(path: Path, directory: Path, known: dict[str, Any]) -> None:
    content = json.dumps({"directory": str(directory), "files": known})
    try:
        write_atomically(path, lambda temporary: temporary.write_text(content))
    except OSError as error:
        _warn(path, error)


def _warn(path: Path, error: OSError) -> None:
    logger.warning("QAM-W: %s: %s, so files are hashed again at every start", path, error.strerror)
