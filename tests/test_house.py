"""The house: which package may import which, and what a wheel carries."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"qamw_kernels": ROOT / "kernels" / "qamw_kernels", "offline_quantize": ROOT / "offline_quantize",
            "qamw_vllm": ROOT / "qamw_vllm"}
MAY_IMPORT = {"qamw_kernels": set(), "offline_quantize": {"qamw_kernels"}, "qamw_vllm": {"qamw_kernels"}}


def imported(file: Path) -> set[str]:
    """Top-level names of everything a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        strangers = imported(file) & set(PACKAGES) - {package} - MAY_IMPORT[package]
        assert not strangers, f"{file.relative_to(ROOT)} imports {strangers}"
        if package != "qamw_vllm" and file.name != "served.py":  # qamw eval --engine vllm starts an engine, lazily: see below
            assert "vllm" not in imported(file), f"{file.relative_to(ROOT)} imports vllm"


def test_importing_is_cheap_and_touches_nothing() -> None:
    """No kernel compiler, no engine, no model library just for importing the three packages."""
    script = ("import sys, qamw_kernels.codec, qamw_kernels.format, qamw_vllm, offline_quantize.cli, offline_quantize.evaluate\n"
              "print([m for m in ('triton', 'vllm', 'transformers', 'matplotlib') if m in sys.modules])")
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]"


def test_no_package_named_kernels() -> None:
    """Hugging Face has one, and transformers imports it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    data = {"qamw_kernels/codebooks.safetensors", "offline_quantize/calibration.txt", "offline_quantize/calibration.LICENSE.md"}
    assert data <= set(names)
    for package, folder in PACKAGES.items():
        assert {f"{package}/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*.py")} <= set(names)
