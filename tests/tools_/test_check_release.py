"""The check before a release sees what does not agree."""

import pytest

from tools.check_release import faults

PROJECT = '[project]\nversion = "0.2.0"\n'
CHANGELOG = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n## 0.1.0\n"


def test_they_agree() -> None:
    assert faults("v0.2.0", PROJECT, CHANGELOG) == []


@pytest.mark.parametrize(
    ("tag", "changelog", "fault"),
    [
        ("v0.1.0", CHANGELOG, "tag v0.1.0: expected v0.2.0"),
        ("v0.2.0", "## 0.1.0\n", "expected 0.2.0 first, got 0.1.0"),
        ("v0.2.0", "", "expected 0.2.0 first, got None"),
        ("v0.2.0", "## 0.2.0 (unreleased)\n", "still called unreleased"),
    ],
)
def test_they_do_not(tag: str, changelog: str, fault: str) -> None:
    (found,) = faults(tag, PROJECT, changelog)
    assert fault in found
