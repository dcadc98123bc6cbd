"""WikiText as lm-evaluation-harness reads it: cut into pages, its spaced punctuation joined."""

import re
from collections.abc import Iterator

_DETOKENIZE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("s '", "s'"),
        ("/' [0-9]/", "/'[0-9]/"),  # a mistake of the harness, kept
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (r" @\.@ ", "."),
        (" : ", ": "),  # one after the other: "a , : b"
        (" ; ", "; "),
        (r" \. ", ". "),
        (" ! ", "! "),
        (r" \? ", "? "),
        (" , ", ", "),
        (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    )
]


def pages(raw: str) -> Iterator[str]:
    """The pages of a WikiText file, each from its heading `` = Title = `` on.

    A text without headings is one page.
    """
    page: list[str] = []
    for line in raw.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            if any(part.strip() for part in page):
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def detokenized(page: str) -> str:
    """A page with spaced-out punctuation drawn together, by the rules of lm-evaluation-harness."""
    for pattern, replacement in _DETOKENIZE:
        page = pattern.sub(replacement, page)
    return page
