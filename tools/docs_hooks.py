"""A hook for mkdocs.yml: in pages, links to files outside docs/ become the paths of the files.

On a repository's web page such links lead to the file; the site has only the pages.
"""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)[^)]*\)")
_SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Returns|Yields|Raises):\n)")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?(?=[\w.]+`)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with every link out of docs/ as plain text: the link's text and the file's path."""
    return _OUTSIDE.sub(_as_text, markdown)


def _as_text(link: re.Match[str]) -> str:
    text, path = link.groups()
    return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} in `{path}`"


def as_markdown(docstring: str) -> str:
    """A docstring, without indentation, as its parser needs it.

    The parser sees a section only below an empty line, and does not know Sphinx roles.
    """
    return _ROLE.sub("`", _SECTION.sub("\n\n", docstring))
