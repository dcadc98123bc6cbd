"""What a calibration text consists of: a plain text, or JSON Lines of texts and chats."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from offline_quantize.errors import QuantizeError, printable, shortened
from offline_quantize.model.chat_template import render_chats
from qamw_kernels.errors import FileError
from qamw_kernels.files import parse_json

JSON_LINES = (".jsonl", ".ndjson", ".json")
TEXT, CHAT = "text", "messages"
ROLE, CONTENT = "role", "content"
_BETWEEN = "\n\n"

logger = logging.getLogger(__name__)


class Chat(NamedTuple):
    """A chat, as chat templates take it.

    Attributes:
        messages: each with "role", a string, "content", a string or None, and whatever else it has.
        tools: schemas of functions, or None.
        place: file and line.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    place: str

    def plain(self) -> str:
        """Roles and contents, with colons between them."""
        return _BETWEEN.join(f"{m[ROLE]}: {m[CONTENT] or ''}" for m in self.messages)


Document = str | Chat


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        QuantizeError: no such file, or not UTF-8; names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise QuantizeError(f"{path}: {reason}") from None


def read_documents(path: Path) -> list[Document]:
    """The documents of a file: one, unless its name ends in .jsonl, .ndjson or .json.

    Of such a file, every line is an object with "text", a string, or with "messages" and perhaps
    "tools": see :class:`Chat`. Other keys and empty lines are ignored.

    Raises:
        QuantizeError: no such file, not UTF-8, no document in it, or a line is no JSON object or
            has other content; names file and line.
    """
    text = read_text(path)
    if path.suffix.lower() not in JSON_LINES:
        return [text]
    lines = enumerate(text.split("\n"), 1)  # splitlines() would also split within strings
    documents = [_document(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not documents:
        raise QuantizeError(f"{path}: empty, expected a document on every line")
    return documents


def _document(line: str, place: str) -> Document:
    try:
        values = parse_json(line.encode(), Path(place))
    except FileError as error:
        raise QuantizeError(f"{error}; expected a JSON object on every line") from None
    text, messages, tools = values.get(TEXT), values.get(CHAT), values.get("tools")
    if isinstance(text, str) and messages is None:
        return text
    if text is not None or not isinstance(messages, list) or not messages:
        raise QuantizeError(
            f'{place}: {shortened(line, 80)}, expected either "{TEXT}", a string, '
            f'or "{CHAT}", a list of messages'
        )
    messages = [_message(message, number, place) for number, message in enumerate(messages, 1)]
    if tools is not None and not isinstance(tools, list):
        raise QuantizeError(f"{place}: tools are {shortened(tools, 80)}, expected a list")
    return Chat(messages, tools, place)


def _message(message: Any, number: int, place: str) -> dict[str, Any]:
    """A message of a chat; content in parts becomes one string, as in vLLM."""
    values = message if isinstance(message, dict) else {}
    role, content = values.get(ROLE), values.get(CONTENT)
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "\n".join(part["text"] for part in content)
    calls_tools = content is None and bool(values.get("tool_calls"))
    if not isinstance(role, str) or not (isinstance(content, str) or calls_tools):
        raise QuantizeError(
            f"{place}: message {number} is {shortened(message, 80)}, expected an object with "
            f'"{ROLE}", a string, and "{CONTENT}", a string, parts of text, or null beside '
            '"tool_calls"'
        )
    return values | {CONTENT: content}


def _is_text(part: Any) -> bool:
    """Whether a part of a message's content is text, as OpenAI's API has it."""
    values = part if isinstance(part, dict) else {}
    return values.get("type") == "text" and isinstance(values.get("text"), str)


def as_texts(documents: list[Document], tokenizer: Any, path: Path) -> list[str]:
    """The texts of documents, with separators; chats as the model's chat template renders them.

    A model may have one template for chats with tools and one for others. Chats that the template
    refuses, or all chats where there is none, become :meth:`Chat.plain`; a warning says so.

    Args:
        tokenizer: of the model, from transformers.
        path: of the model.
    Raises:
        QuantizeError: the template took too much memory or time.
    """
    rendered: dict[str, str] = {}
    for with_tools in (False, True):
        chats = [d for d in documents if isinstance(d, Chat) and bool(d.tools) == with_tools]
        places = [chat.place for chat in chats]
        rendered |= zip(places, _templated(chats, tokenizer, path), strict=True)
    texts = [rendered[d.place] if isinstance(d, Chat) else d for d in documents]
    return [text + _BETWEEN for text in texts[:-1]] + texts[-1:]


def _templated(chats: list[Chat], tokenizer: Any, path: Path) -> list[str]:
    """The texts of chats that all have tools, or that all have none."""
    if not chats:
        return []
    try:
        template = tokenizer.get_chat_template(tools=chats[0].tools or None)
    except (AttributeError, NotImplementedError, ValueError):  # the second from mistral_common's
        _warn(len(chats), len(chats), f"{path} has no chat template, or no default one")
        return [chat.plain() for chat in chats]
    special_tokens = tokenizer.special_tokens_map
    given = [{"messages": chat.messages, "tools": chat.tools} for chat in chats]
    rendered = render_chats(template, special_tokens, given, path)
    refused = [(c, r) for c, r in zip(chats, rendered, strict=True) if r.text is None]
    if refused:
        chat, (_, why) = refused[0]
        reason = f"the chat template of {path} refuses them, first {chat.place} ({why})"
        _warn(len(refused), len(chats), reason)
    bos = special_tokens.get("bos_token")
    return [
        chat.plain() if text is None else _without_beginning(text, chat, bos)
        for chat, (text, _) in zip(chats, rendered, strict=True)
    ]


def _warn(number: int, total: int, reason: str) -> None:
    logger.warning("chats read as plain text: %d of %d; %s", number, total, printable(reason))


def _without_beginning(text: str, chat: Chat, bos: str | None) -> str:
    """A chat without the BOS at its beginning: each window of the text has a BOS of its own.

    A template that writes BOS several times begins messages with it, as SmolLM2's does; then all
    stay. With a single message the two cases look the same, and BOS stays too.
    """
    if not bos or len(chat.messages) == 1:
        return text
    written = text.count(bos) - sum(
        (message[CONTENT] or "").count(bos) for message in chat.messages
    )
    return text.removeprefix(bos) if written == 1 else text
