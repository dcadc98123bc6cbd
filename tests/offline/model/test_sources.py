"""Whether files are still what they were when they were read."""

import os
import time
from pathlib import Path

import pytest

from offline_quantize.errors import QuantizeError
from offline_quantize.model.sources import Sources
from qamw_kernels.errors import FileError
from qamw_kernels.format.manifest import FileEntry


def hashed(directory: Path) -> Sources:
    sources = Sources(directory)
    for path in sorted(directory.iterdir()):
        sources.note(path.name)
    sources.hash_all({})
    return sources


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two files, one of several chunks."""
    (tmp_path / "large").write_bytes(bytes(range(256)) * 2**14)
    (tmp_path / "small").write_bytes(b"content")
    return tmp_path


def test_every_file_is_hashed_once(directory: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    sources = Sources(directory)
    for file in ("large", "small"):
        sources.note(file)
    sources.hash_all({}, lambda *step: steps.append(step))
    assert steps[-1] == ("hashing", 2**22 + 7, 2**22 + 7) and len(steps) == 5
    assert sources.entry("large") == FileEntry.of(directory / "large")
    again = Sources(directory)
    for file in ("large", "small"):
        again.note(file)
    again.hash_all(sources.files, lambda *step: pytest.fail("read again"))
    assert again.files == sources.files


def test_other_content_is_refused_by_name_and_a_touch_goes_on(directory: Path) -> None:
    """Also where the time of modification is set back."""
    sources, before = hashed(directory), (directory / "small").stat()
    os.utime(directory / "small", (1, 1))
    sources.check_all()
    time.sleep(0.02)  # the clock of a file system goes in steps of some milliseconds
    (directory / "small").write_bytes(b"another")
    os.utime(directory / "small", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(QuantizeError, match="small: has other content than when the run started"):
        sources.check_all()
    again = Sources(directory)
    for file in ("large", "small"):
        again.note(file)
    with pytest.raises(QuantizeError, match="small: has other content than when the run started"):
        again.hash_all(sources.files)


def test_a_touch_while_a_file_is_read_is_refused(directory: Path) -> None:
    """What was read may be of two versions, even if it looks the same afterwards."""
    sources = hashed(directory)
    sources.check_read("small")
    os.utime(directory / "small", (1, 1))
    with pytest.raises(QuantizeError, match="small: was changed while it was being read"):
        sources.check_read("small")


def test_a_change_between_reading_and_hashing_is_refused(directory: Path) -> None:
    sources = Sources(directory)
    sources.note("small")
    (directory / "small").write_bytes(b"longer than before")
    with pytest.raises(QuantizeError, match="small: was changed while it was being read"):
        sources.hash_all({})


def test_a_file_that_vanishes_is_named(directory: Path) -> None:
    sources = hashed(directory)
    (directory / "small").unlink()
    with pytest.raises(FileError, match="small: no such file"):
        sources.check_all()
