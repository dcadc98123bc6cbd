"""Files: read with care, and written whole or not at all.

A checkpoint may have been put together by anyone, so nothing is taken for granted. What is read is
a regular file, of a size that its kind can have, and a message names it.
"""

import hashlib
import io
import json
import os
import secrets
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qamw_kernels.errors import FileError

MAX_JSON_BYTES = 256 * 2**20
"""The index of a model with a million tensors is smaller; config.json is much smaller."""

TEMPORARY = ".partial"
"""Suffix of a file that is being written."""

_CHUNK_BYTES = 2**20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class Stamp:
    """What the file system records of a file: if the content changes, one of these changes.

    A program can set back the modification time (mtime), but not the time of the last change
    (ctime).

    Attributes:
        num_bytes: size.
        device: of the file system.
        inode: of the file; another one after a replacement.
        mtime_ns: time of modification.
        ctime_ns: time of the last change, of the content or of what is recorded here.
    """

    num_bytes: int
    device: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @staticmethod
    def of(stat: os.stat_result) -> "Stamp":
        """The stamp in the result of a stat call."""
        return Stamp(stat.st_size, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


def is_inside(name: str) -> bool:
    """Whether the name of a file, with ``/`` between folders, cannot lead out of a directory."""
    path = PurePosixPath(name)
    leads_out = path.is_absolute() or ".." in path.parts or "\\" in name
    return bool(path.name) and not leads_out


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file to read it; links to one are followed.

    Raises:
        FileError: there is none, or it is of another kind: a FIFO would never end.
    """
    try:
        # O_NONBLOCK, because opening a FIFO would wait for a writer; regular files ignore it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise FileError(f"{path}: {_KINDS.get(kind, 'no file')}, expected a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        max_bytes: largest size that the file may have.
    Raises:
        FileError: no such file, not a regular file, too large, or not a JSON object of valid
            Unicode in which no key is repeated.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise FileError(f"{path}: {size} bytes, expected at most {max_bytes} of JSON")
        return parse_json(file.read(), path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in the bytes of a file, or of a part of it.

    Raises:
        FileError: see :func:`read_json`.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_once_each)
        if "\\ud" in text.lower():  # a lone surrogate is valid JSON, but cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise FileError(f"{path}: JSON that is nested too deeply") from None
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Refuses repeated keys: most readers take the last, others the first."""
    value = dict(pairs)
    if len(value) < len(pairs):
        ((key, count),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is there {count} times")
    return value


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal.

    Raises:
        FileError: see :func:`open_regular`.
    """
    return hash_file(path)[0]


def hash_file(
    path: Path, tell: Callable[[int], object] = lambda _: None
) -> tuple[str, Stamp | None]:
    """SHA-256 of a regular file's bytes, in hexadecimal, and the stamp that it is valid for.

    Args:
        tell: is called with the number of bytes of every part that was read.
    Returns:
        The stamp is None if the file changed meanwhile: what was read may mix two versions.
    Raises:
        FileError: see :func:`open_regular`.
    """
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    with open_regular(path) as file:
        before = Stamp.of(os.fstat(file.fileno()))
        while num_bytes := file.readinto(buffer):
            digest.update(memoryview(buffer)[:num_bytes])
            tell(num_bytes)
        after = Stamp.of(os.fstat(file.fileno()))
    return digest.hexdigest(), before if before == after else None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: under a temporary name, synced, renamed.

    Args:
        path: of the file; its folder must exist.
        write: is called with the temporary path, which no other process has.
    """
    # Does not contain the file's own name, which may already have the maximum length.
    temporary = path.with_name(f".qamw-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except (Exception, KeyboardInterrupt):
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def leftovers(directory: Path) -> list[Path]:
    """Temporary files below a directory, of processes that were killed while they wrote."""
    return list(directory.rglob(f".qamw-*{TEMPORARY}"))


def sync(path: Path) -> None:
    """Flush to disk (fsync) what was written to a file, or which files a directory has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
