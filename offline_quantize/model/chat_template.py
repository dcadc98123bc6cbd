"""Chats as the chat template of a model writes them.

A template is a program that came with the model, so another process runs it, within limits. It has
no clock and no dice there: the same chats become the same text on every day.
"""

import json
import random
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from offline_quantize.errors import QuantizeError
from offline_quantize.model.limited import BASE_SECONDS, EndedError, receive, run_limited

# Llama 3.2, gpt-oss and others write the date of today into every chat.
_TODAY = datetime(2026, 1, 1)
_MOST_TIMES, _MOST_MORE = 16, 2**16
"""A rendered chat has at most so many times the characters of its JSON, and so many more."""


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
        base_seconds: that it may take for empty chats.
    Raises:
        QuantizeError: the template took too much memory or time.
    """
    given = [template, special_tokens, chats]
    text_bytes = len(json.dumps(given))
    try:
        written = run_limited(__name__, given, text_bytes, base_seconds)
    except EndedError as how:
        raise QuantizeError(
            f"{path}: its chat template cannot write {len(chats)} chats: {how}"
        ) from None
    return [Rendered(*values) for values in json.loads(written.splitlines()[-1])]


def _main() -> None:
    """What the other process does."""
    template, special_tokens, chats = receive()
    print(json.dumps([_render(template, special_tokens, chat) for chat in chats]))


def _render(template: str, special_tokens: dict[str, Any], chat: dict[str, Any]) -> Rendered:
    from transformers.utils.chat_template_utils import render_jinja_template

    random.seed(0)
    named: dict[str, Any] = {"strftime_now": _TODAY.strftime}  # instead of transformers' own
    try:
        written: Any = render_jinja_template(  # its annotation is wrong
            [chat["messages"]], chat["tools"], chat_template=template, **named, **special_tokens
        )
        text = written[0][0]
        text.encode()
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything
        return Rendered(None, f"{type(error).__name__}: {error}")
    if not text.strip():
        return Rendered(None, "it writes nothing")
    if len(text) > _MOST_TIMES * len(json.dumps(chat)) + _MOST_MORE:
        return Rendered(None, f"it writes {len(text)} characters")
    return Rendered(text)


if __name__ == "__main__":
    _main()
