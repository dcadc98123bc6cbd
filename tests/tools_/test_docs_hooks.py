"""Links out of docs/ become text on the site, and docstrings what their parser wants."""

import pytest

from tools.docs_hooks import as_markdown, on_page_markdown


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("([figures](../a/b.jsonl), c)", "(figures in `a/b.jsonl`, c)"),
        ("[b.py](../a/b.py) and [`c.py`](../../c.py)", "`a/b.py` and `c.py`"),
        ("[Format](format.md#planes)", "[Format](format.md#planes)"),
    ],
)
def test_links_out_of_the_pages(markdown: str, expected: str) -> None:
    assert on_page_markdown(markdown) == expected


def test_docstrings() -> None:
    """A section begins below an empty line; names lose their role."""
    docstring = (
        "See :func:`~a.b`.\n\nArgs:\n    x: as :meth:`C.of` has it.\nReturns:\n    Raises: no."
    )
    assert as_markdown(docstring) == (
        "See `a.b`.\n\nArgs:\n    x: as `C.of` has it.\n\nReturns:\n    Raises: no."
    )
