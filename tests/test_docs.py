"""The pages: links lead to files, and the messages that are explained are those of the code."""

import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.refusals import GAP, HANDED_ON, Refusal, Sources

ROOT = Path(__file__).parents[1]
PACKAGES = ("offline_quantize", "qamw_vllm", "kernels/qamw_kernels")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
PLACEHOLDER = re.compile(r"\b[A-Z]+\b|\.\.\.")  # a name, a value
MOST_FOR_A_MESSAGE = 12  # refusals
README_LINES, README_COLUMNS = 180, 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_image_is_of_the_range_that_is_supported() -> None:
    """The Dockerfile names a vLLM and packages, as pyproject.toml has them."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (image,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", dockerfile, re.M)
    (supported,) = map(Requirement, extras["gpu"])
    assert supported.specifier.contains(image)
    named = re.findall(r"'(\w+[<>=][^']+)'", dockerfile)
    assert len(named) >= 2 and set(named) <= set(extras["quantize"])


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > README_COLUMNS] == []


@cache
def explained() -> tuple[str, ...]:
    """The messages in the first cells of the tables of the page on them."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`[^|]+`) \|", page, re.M)
    return tuple(message for cell in cells for message in re.findall("`([^`]+)`", cell))


@cache
def refusals() -> tuple[Refusal, ...]:
    return tuple(Sources.of(ROOT, PACKAGES).refusals())


@cache
def explained_by(message: str) -> frozenset[Refusal]:
    """The refusals that have the words of a message of the page, gaps aside."""
    parts = [part.strip(" :,.()") for part in PLACEHOLDER.split(message)]
    in_order = re.compile(".*".join(re.escape(part) for part in parts if part), re.S)
    return frozenset(refusal for refusal in refusals() if in_order.search(refusal.words))


def test_refusals_are_found() -> None:
    """The rules below look at something."""
    assert len(refusals()) > 200 and len(explained()) > 100


def test_every_refusal_is_explained() -> None:
    """Whatever only hands another error on has no words of its own."""
    found = frozenset().union(*map(explained_by, explained()))
    left = [r for r in refusals() if r not in found and (r.has_words or not r.hands_on)]
    assert [f"{refusal.place}: {refusal.words}" for refusal in left] == []


@pytest.mark.parametrize("message", explained())
def test_explained_messages_are_of_the_code(message: str) -> None:
    """And say which: no word that many messages have."""
    assert 1 <= len(explained_by(message)) <= MOST_FOR_A_MESSAGE


def test_no_message_is_explained_twice() -> None:
    assert [message for message, count in Counter(explained()).items() if count > 1] == []


CODE = """
class FileError(QamwError): ...

def read(path):
    count = f"{len(path)} bytes"
    try:
        return open(path)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}")
    raise FileError(f"{path}: {count}, ", Option("bpw", 7), " is enough" if count else _end())

def _end():
    return f"{NOTHING} was there"

def _size_faults(path):
    yield f"{path}: too long"

NOTHING = "nothing"
"""


def test_words_of_refusals() -> None:
    """Variables, functions and constants are followed; options are spelled as flags."""
    found = Sources({"a.py": CODE}).refusals()
    assert [refusal.words for refusal in found] == [
        f"{GAP}: {HANDED_ON}",
        f"{GAP}: {GAP} bytes, --bpw {GAP} is enough{GAP}nothing was there",
        f"{GAP}: too long",
    ]
    assert [refusal.place for refusal in found] == ["a.py:9", "a.py:10", "a.py:16"]
    assert found[0].hands_on and not found[0].has_words and found[1].has_words
