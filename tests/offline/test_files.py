"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest
import torch

from offline_quantize.files import TEMPORARY, write_atomically
from offline_quantize.output.directory import Output


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    write_atomically(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new"
    assert not list(tmp_path.glob(f"*{TEMPORARY}"))


def test_who_may_read(tmp_path: Path) -> None:
    """A report of figures follows the umask; a checkpoint, which is served, can always be read."""
    umask = os.umask(0o077)
    try:
        write_atomically(tmp_path / "figures.json", lambda path: path.write_text("{}"))
        Output(tmp_path / "out", "fingerprint", resume=False).write_shard(
            "model.safetensors", {"x": torch.zeros(1)}, None
        )
    finally:
        os.umask(umask)
    assert (tmp_path / "figures.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644
