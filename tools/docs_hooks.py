"""What mkdocs.yml asks for: links of the pages to files outside docs/ become their paths.

On a repository's web page such links lead to the file; the site has pages alone.
"""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with every link out of docs/ as text."""
    return _OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
