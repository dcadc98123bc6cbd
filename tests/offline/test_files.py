"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest
import torch

from offline_quantize.files import leftovers, write_atomically
from offline_quantize.output.directory import Output
from offline_quantize.output.journal import Journal


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


def test_who_may_read(tmp_path: Path) -> None:
    """A report of figures follows the umask; a checkpoint, which is served, can always be read."""
    umask = os.umask(0o077)
    try:
        write_atomically(tmp_path / "figures.json", lambda path: path.write_text("{}"))
        (tmp_path / "out").mkdir()
        output = Output(tmp_path / "out", Journal("request"))
        output.write_shard("model.safetensors", {"x": torch.zeros(1)}, None)
    finally:
        os.umask(umask)
    assert (tmp_path / "figures.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644
