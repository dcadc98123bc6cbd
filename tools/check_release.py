"""Do tag, version and changelog agree? ``python -m tools.check_release [TAG]``.

Without TAG, that of GITHUB_REF_NAME, as GitHub's workflows have it.
"""

import os
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def faults(tag: str, project: str, changelog: str) -> list[str]:
    """What does not agree.

    Args:
        tag: such as v0.1.0.
        project: the text of pyproject.toml.
        changelog: the text of CHANGELOG.md, whose first section is the version to release.
    """
    version = tomllib.loads(project)["project"]["version"]
    section = re.search(r"^## (.+)$", changelog, re.MULTILINE)
    found = []
    if tag != f"v{version}":
        found.append(f"tag {tag}: expected v{version}, the version of pyproject.toml")
    if section is None or section[1].split()[0] != version:
        found.append(f"CHANGELOG.md: expected {version} first, got {section and section[1]}")
    elif "unreleased" in section[1]:
        found.append(f"CHANGELOG.md: {version} is still called unreleased")
    return found


if __name__ == "__main__":
    tag = sys.argv[1] if len(sys.argv) > 1 else os.environ["GITHUB_REF_NAME"]
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "CHANGELOG.md")]
    sys.exit("\n".join(faults(tag, *texts)))
