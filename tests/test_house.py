"""The house: which module may import which, how long files are, and what a wheel holds."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers.house import (
    FOLDERS,
    PACKAGES,
    ROOT,
    circle,
    folder_graph,
    import_graph,
    importers,
    module_files,
    nested_targets,
    relative_imports,
    too_long,
    wrong_directions,
)

FILES = module_files()
SOURCES = {module: file.read_text(encoding="utf-8") for module, file in FILES.items()}
IN_PACKAGES = {m: source for m, source in SOURCES.items() if m.split(".")[0] in PACKAGES}

MAY_IMPORT = {
    "qamw_kernels": set(),
    "offline_quantize": {"qamw_kernels"},
    "qamw_vllm": {"qamw_kernels"},
    "tools": set(PACKAGES),
    "benchmarks": {*PACKAGES, "tools"},
    "examples": {*PACKAGES, "tools"},
    "tests": {*PACKAGES, "tools", "benchmarks", "examples"},
}
MAX_FILE, MAX_BODY = 400, 60  # lines

PACKAGE_DATA = {
    "qamw_kernels/format/codebooks.safetensors",
    "qamw_kernels/ops/crossover.json",
    "offline_quantize/calibration/calibration.jsonl",
    "offline_quantize/calibration/calibration.LICENSE.md",
    "offline_quantize/planning/served.json",
    *(f"{package}/py.typed" for package in PACKAGES),
}


def test_every_module_is_found() -> None:
    """The rules below look at something."""
    assert set(FOLDERS) == {module.split(".")[0] for module in SOURCES}
    assert len(SOURCES) > 100 and __name__ in SOURCES


def test_no_import_circles() -> None:
    assert circle(import_graph(SOURCES)) == []


def test_no_circles_between_rooms() -> None:
    assert circle(folder_graph(SOURCES)) == []


def test_imports_run_one_way() -> None:
    assert wrong_directions(SOURCES, MAY_IMPORT) == []


def test_imports_are_absolute() -> None:
    assert relative_imports(SOURCES) == []


def test_who_knows_vllm_and_transformers() -> None:
    """The kernels run without both; the quantizer starts an engine in one place only."""
    vllm = importers(IN_PACKAGES, "vllm")
    elsewhere = {module for module in vllm if module.split(".")[0] != "qamw_vllm"}
    assert elsewhere == {"offline_quantize.evaluation.vllm_engine"}
    transformers = importers(IN_PACKAGES, "transformers")
    in_kernels = {module for module in transformers if module.startswith("qamw_kernels.")}
    folders = {module.rpartition(".")[0] for module in in_kernels}
    assert folders == {"qamw_kernels.integrations"}


def test_files_and_functions_are_short() -> None:
    assert too_long(SOURCES, MAX_FILE, MAX_BODY) == []


def test_kernels_have_no_nested_targets() -> None:
    """Triton 3.7 cannot read them."""
    kernels = {m: s for m, s in SOURCES.items() if re.search(r"^@(gluon|triton)\.jit", s, re.M)}
    assert {"qamw_kernels.ops.triton.kernels", "qamw_kernels.ops.gluon.ring"} < kernels.keys()
    assert nested_targets(kernels) == []


def environment_variables(sources: Mapping[str, str]) -> set[str]:
    """Texts in the code that have the form of the name of an environment variable."""
    names = r"""["']((?:QAMW|LLAMA|TRITON|VLLM|HF|TOKENIZERS|OMP)_[A-Z_]+|PYTHONPATH)["']"""
    return {name for source in sources.values() for name in re.findall(names, source)}


def test_every_environment_variable_is_documented() -> None:
    sources = {m: source for m, source in SOURCES.items() if m.split(".")[0] != "tests"}
    found = environment_variables(sources)
    assert {"QAMW_CPU_BACKEND", "QAMW_MODEL_CACHE"} < found
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert [name for name in sorted(found) if f"`{name}" not in page] == []


# --- each rule can fail


@pytest.mark.parametrize(
    "sources",
    [
        {"p.a": "import p.b", "p.b": "from p import a"},
        {"p.a": "import p.b", "p.b": "import p.c", "p.c": "def f():\n    from p.a import x"},
        {"p.a": "def f():\n    import p.b", "p.b": "class A:\n    import p.a"},
        {"p": "import q.b", "p.a": "", "q.b": "from p.a import x"},  # by the __init__ of p
        {"p": "from p.a import x", "p.a": "x = 1"},  # p.a runs the __init__ of p
        {"p": "def f():\n    import p.a", "p.a": "from p import f"},
    ],
)
def test_circles_are_found(sources: dict[str, str]) -> None:
    assert circle(import_graph(sources))


@pytest.mark.parametrize(
    "sources",
    [
        {"p.a": "import p.b", "p.b": "import p.c, torch", "p.c": ""},
        {"p.a": "import p.b", "p.b": "if TYPE_CHECKING:\n    import p.a"},
        {"p": "def register():\n    import p.a", "p.a": "import p.b", "p.b": ""},
    ],
)
def test_no_circles_are_invented(sources: dict[str, str]) -> None:
    assert not circle(import_graph(sources))


def test_circles_between_rooms_are_found() -> None:
    sources = {
        "p.a.x": "import p.b.x",
        "p.a.y": "",
        "p.b.x": "",
        "p.b.y": "def f():\n    from p.a.y import g",
    }
    assert not circle(import_graph(sources))
    assert set(circle(folder_graph(sources))) == {"p.a", "p.b"}
    assert not circle(folder_graph({**sources, "p.b.y": "import p.c.x", "p.c.x": ""}))


@pytest.mark.parametrize(
    "module, source",
    [
        ("qamw_kernels.ops", "def f():\n    import qamw_vllm.config"),
        ("qamw_vllm.linear", "from offline_quantize import pipeline"),
        ("offline_quantize.cli", "from tools.real_models import real_model"),
        ("benchmarks.memory", "from tests.helpers import models"),
        ("tools.x", "if TYPE_CHECKING:\n    import benchmarks.kernels"),
        ("examples.demo", "import benchmarks"),
    ],
)
def test_wrong_directions_are_found(module: str, source: str) -> None:
    assert len(wrong_directions({module: source}, MAY_IMPORT)) == 1


def test_importers_are_found() -> None:
    sources = {"a": "def f():\n    from vllm.x import y", "b": "import vllm_x", "c": "import vllm"}
    assert importers(sources, "vllm") == {"a", "c"}


def test_nested_targets_are_found() -> None:
    sources = {"p.a": "x, y = 1, 2\n(x, y), z = (1, 2), 3", "p.b": "x = (1, 2), 3"}
    assert nested_targets(sources) == ["p.a:2"]


def test_relative_imports_are_found() -> None:
    sources = {"p.a": "from . import b", "p.b": "from .a import x", "p.c": "from p import a"}
    assert relative_imports(sources) == ["p.a", "p.b"]


def test_what_is_too_long_is_found() -> None:
    body = "    x = 1\n"
    sources = {
        "short": f'def f():\n    """Two\n    lines."""\n{body * 60}',
        "body": f"class A:\n    def f():\n        class B: pass\n{('    ' + body) * 60}",
        "file": "x = 1\n" * 401,
    }
    assert too_long(sources, MAX_FILE, MAX_BODY) == ["body:f", "file"]


# --- what is installed


def test_importing_is_cheap_and_touches_nothing() -> None:
    """No kernel compiler, no engine, no model library just for importing the three packages."""
    script = (
        "import sys\n"
        "import qamw_kernels.codec.encode, qamw_kernels.codec.decode\n"
        "import qamw_kernels.format.codebook, qamw_kernels.format.weight\n"
        "import qamw_vllm, offline_quantize.cli, offline_quantize.evaluation.run\n"
        "heavy = ('triton', 'vllm', 'transformers', 'matplotlib')\n"
        "print([module for module in heavy if module in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]"


def test_no_package_named_kernels() -> None:
    """Hugging Face has one, and transformers imports it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    """Built from a copy: an old build folder could put files of the past into the wheel."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("kernels", "offline_quantize", "qamw_vllm", "tests", "tools", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    subprocess.run([*command, copy], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        f"{package}/{file.relative_to(FOLDERS[package]).as_posix()}"
        for package in PACKAGES
        for file in FOLDERS[package].rglob("*.py")
    }
    assert names == modules | PACKAGE_DATA
