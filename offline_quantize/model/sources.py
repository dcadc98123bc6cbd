"""The files that a model is read from, and whether they still are what they were.

A file is hashed once. After that, its stamp shows whether it may have changed.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from offline_quantize.errors import Option, QuantizeError
from offline_quantize.progress import Progress, silent
from qamw_kernels.errors import FileError
from qamw_kernels.files import Stamp, hash_file, open_regular
from qamw_kernels.format.manifest import FileEntry

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_THREADS = 8  # that hash: more would not be faster on most disks


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was hashed.

    Attributes:
        stamp: the same before and after hashing.
        sha256: of its bytes, in hexadecimal.
    """

    stamp: Stamp
    sha256: str


class Sources:
    """The files of one model that are read.

    Attributes:
        directory: of the model.
        files: path inside the directory -> the file, once :meth:`hash_all` has read it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, SourceFile] = {}
        self._stamps: dict[str, Stamp] = {}

    def note(self, file: str) -> None:
        """Remember a file as it is now; call this before it is read for the first time.

        Raises:
            FileError: no regular file that can be opened, or a mere pointer to one.
        """
        path = self.directory / file
        with open_regular(path) as opened:
            self._stamps.setdefault(file, Stamp.of(os.fstat(opened.fileno())))
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise FileError(
                    f"{path}: a git-lfs pointer, not the file itself; run: git lfs pull"
                )

    def hash_all(self, known: Mapping[str, SourceFile], progress: Progress = silent) -> None:
        """Hash every file that was noted, several at a time.

        Args:
            known: what an interrupted run hashed; not read again where the stamp is the same.
            progress: called with bytes; the stage is "hashing".
        Raises:
            QuantizeError: a file has changed since it was noted, or differs from ``known``.
        """
        same = {f for f, stamp in self._stamps.items() if f in known and known[f].stamp == stamp}
        changed = sorted(self._stamps.keys() - same)
        digests = _hash_files(self.directory, {f: self._stamps[f] for f in changed}, progress)
        for file, digest in digests.items():
            if file in known and known[file].sha256 != digest:
                raise _other_content(self.directory / file)
            self.files[file] = SourceFile(self._stamps[file], digest)
        self.files |= {file: known[file] for file in same}
        if known and (differing := sorted(known.keys() ^ self.files.keys())):
            raise QuantizeError(
                f"{self.directory / differing[0]}: was {'' if differing[0] in known else 'not '}"
                "there when the run started; restore that state, or start again in a new directory"
            )

    def check(self, file: str) -> None:
        """Check, before a file is read, that its content has not changed.

        A file with another stamp is hashed again, and accepted if the hash is the same.

        Raises:
            QuantizeError: the content has changed, or may have and was never hashed.
        """
        stamp = self._stamp(file)
        if stamp == self._stamps[file]:
            return
        if file not in self.files:
            raise _changed_while_read(self.directory / file)
        if _sha256(self.directory / file, stamp) != self.files[file].sha256:
            raise _other_content(self.directory / file)
        self._stamps[file] = stamp

    def check_read(self, file: str) -> None:
        """Check, after a file was read, that it was not touched meanwhile.

        Raises:
            QuantizeError: what was read may be of two versions.
        """
        if self._stamp(file) != self._stamps[file]:
            raise _changed_while_read(self.directory / file)

    def check_all(self) -> None:
        """:meth:`check` every file."""
        for file in self._stamps:
            self.check(file)

    def entry(self, file: str) -> FileEntry:
        """What a manifest says of a file that was hashed."""
        source = self.files[file]
        return FileEntry(source.sha256, source.stamp.num_bytes)

    def _stamp(self, file: str) -> Stamp:
        with open_regular(self.directory / file) as opened:
            return Stamp.of(os.fstat(opened.fileno()))


def _hash_files(directory: Path, stamps: Mapping[str, Stamp], progress: Progress) -> dict[str, str]:
    """SHA-256 of files by name."""
    total, done, lock, stopped = sum(s.num_bytes for s in stamps.values()), 0, Lock(), False

    def tell(num_bytes: int) -> None:
        nonlocal done
        with lock:
            if stopped:
                raise InterruptedError
            done += num_bytes
            progress("hashing", done, total)

    def digest(file: str) -> str:
        return _sha256(directory / file, stamps[file], tell)

    if not stamps:
        return {}
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        try:
            return dict(zip(stamps, threads.map(digest, stamps), strict=True))
        except BaseException:  # do not wait for files of many gigabytes
            stopped = True
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _sha256(path: Path, stamp: Stamp, tell: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file that has this stamp, before and after it is read."""
    digest, found = hash_file(path, tell)
    if found != stamp:
        raise _changed_while_read(path)
    return digest


def _other_content(path: Path) -> QuantizeError:
    return QuantizeError(
        f"{path}: has other content than when the run started; the result would mix two models: "
        "restore the file, or start again in a new directory"
    )


def _changed_while_read(path: Path) -> QuantizeError:
    return QuantizeError(
        f"{path}: was changed while it was being read; when no program writes to it, start again (",
        Option("resume", True),
        " keeps finished shards)",
    )
