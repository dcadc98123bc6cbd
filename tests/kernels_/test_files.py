"""Files that are written whole or not at all, and hashed as one version or none."""

import hashlib
import os
from pathlib import Path

import pytest

from qamw_kernels.errors import FileError
from qamw_kernels.files import (
    Stamp,
    hash_file,
    is_inside,
    leftovers,
    open_regular,
    sha256_of,
    write_atomically,
)


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    write_atomically(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_temporary_names_are_a_writers_own(tmp_path: Path) -> None:
    """Two that write one file do not write into each other; names may be as long as can be."""
    file, names = tmp_path / ("x" * 255), set()

    def write(path: Path) -> None:
        names.add(path)
        if len(names) == 1:
            write_atomically(file, write)
        path.write_text(path.name)

    write_atomically(file, write)
    assert len(names) == 2 and {path.parent for path in names} == {tmp_path}
    assert list(tmp_path.iterdir()) == [file]
    killed = names.pop()
    killed.touch()
    assert leftovers(tmp_path) == [killed]


def test_a_hash_is_of_one_version_of_a_file(tmp_path: Path) -> None:
    file, content = tmp_path / "file", bytes(range(256)) * 2**13  # of two parts
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    parts: list[int] = []
    assert hash_file(file, parts.append) == (digest, Stamp.of(file.stat()))
    assert parts == [2**20, 2**20] and sha256_of(file) == digest
    assert hash_file(file, lambda _: os.utime(file, (1, 1))) == (digest, None)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """What is refused is closed again."""
    os.mkfifo(tmp_path / "fifo")
    descriptors = len(os.listdir("/proc/self/fd"))
    for path, kind in ((tmp_path, "a directory"), (tmp_path / "fifo", "a FIFO")):
        with pytest.raises(FileError, match=f"{path}: {kind}, expected a regular file"):
            open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("name", ["a", "a/b.c", ".a", "a..b"])
def test_names_inside_a_directory(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize("name", ["", ".", "/a", "..", "../a", "a/../../b", "a\\b"])
def test_names_that_lead_out_of_a_directory(name: str) -> None:
    assert not is_inside(name)
