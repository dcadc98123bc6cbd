"""Chats as the chat template of a model writes them.

A template is a program that came with the model, so another process runs it, within limits. The
date that it sees and its random choices are always the same: what it writes does not change from
one day to the next.
"""

import json
import random
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from offline_quantize.errors import QuantizeError, shortened
from offline_quantize.model.limited import BASE_SECONDS, EndedError, receive, run_limited

# Llama 3.2, gpt-oss and others write the date of today into every chat.
_TODAY = datetime(2026, 1, 1)
_MOST_TIMES, _MOST_MORE = 16, 2**16
"""A rendered chat may have _MOST_TIMES the characters of its JSON, plus _MOST_MORE."""


class Rendered(NamedTuple):
    """A chat, or why there is none.

    Attributes:
        text: None where the template refuses the chat.
        refusal: why, in its words.
    """

    text: str | None
    refusal: str = ""


def render_chats(
    template: str,
    special_tokens: dict[str, Any],
    chats: Sequence[dict[str, Any]],
    path: Path,
    base_seconds: float = BASE_SECONDS,
) -> list[Rendered]:
    """Write chats by a template.

    Args:
        special_tokens: that the template may name, such as "bos_token".
        chats: "messages" and "tools" of each, as transformers takes them.
        path: of the model, for messages.
        base_seconds: time limit for empty chats.
    Raises:
        QuantizeError: the template took too much memory or time.
    """
    given = [template, special_tokens, chats]
    text_bytes = len(json.dumps(given))
    try:
        written = run_limited(__name__, given, text_bytes, base_seconds)
    except EndedError as how:
        raise QuantizeError(f"{path}: its chat template fails: {how}") from None
    return [Rendered(*values) for values in json.loads(written.splitlines()[-1])]


def _main() -> None:
    """What the other process does."""
    template, special_tokens, chats = receive()
    rendered = [_render(template, special_tokens, chat) for chat in chats]
    print(f"\n{json.dumps(rendered)}")  # on a line of its own, even if imports print


def _render(template: str, special_tokens: dict[str, Any], chat: dict[str, Any]) -> Rendered:
    from transformers.utils.chat_template_utils import render_jinja_template

    random.seed(0)
    given: dict[str, Any] = special_tokens | {"strftime_now": _TODAY.strftime}  # not transformers'
    try:
        written: Any = render_jinja_template(  # its annotation is wrong
            [chat["messages"]], chat["tools"], chat_template=template, **given
        )
        text = written[0][0]
        text.encode()
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything
        return Rendered(None, shortened(f"{type(error).__name__}: {error}"))
    if not text.strip():
        return Rendered(None, "it writes nothing")
    most = _MOST_TIMES * len(json.dumps(chat)) + _MOST_MORE
    if len(text) > most:
        return Rendered(None, f"it writes {len(text)} characters, expected at most {most}")
    return Rendered(text)


if __name__ == "__main__":
    _main()
