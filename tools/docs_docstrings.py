"""An extension for mkdocs.yml: docstrings as the parser of the reference page needs them."""

from typing import Any

import griffe

from tools.docs_hooks import as_markdown


class Docstrings(griffe.Extension):
    """Changes every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
