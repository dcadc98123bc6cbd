"""The pages: links lead to files, and the messages that are explained are those of the code."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("offline_quantize", "qamw_vllm", "kernels/qamw_kernels")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
PLACEHOLDER = re.compile(r"\b[A-Z]+\b|\.\.\.|--[a-z-]+")  # a name, a value, an option
README_LINES, README_COLUMNS = 180, 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > README_COLUMNS] == []


def explained() -> list[str]:
    """The first cells of the tables of the page on messages."""
    rows = re.findall(r"^\| `([^`|]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(rows) > 20
    return rows


@cache
def messages() -> list[str]:
    """Every string of the packages, one for all parts that an expression joins."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return [text for file in files for text in _strings(ast.parse(file.read_text()))]


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):  # the parts of a message may be arguments
            yield " ".join(filter(None, map(_text, node.args)))
        elif isinstance(node, ast.expr):
            yield _text(node)


def _text(node: ast.expr) -> str:
    """A string, with whatever is known only when it is made left out."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return ""


@pytest.mark.parametrize("message", explained())
def test_explained_messages_are_of_the_code(message: str) -> None:
    parts = [part.strip(" :,.()") for part in PLACEHOLDER.split(message)]
    in_order = re.compile(".*".join(re.escape(part) for part in parts if part), re.S)
    assert any(in_order.search(text) for text in messages())
