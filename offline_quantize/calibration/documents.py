"""What a calibration text consists of: a plain text, or JSON Lines of texts and chats."""

import logging
from pathlib import Path
from typing import Any, TypeGuard

from offline_quantize.errors import QuantizeError, is_out_of_memory, shortened
from qamw_kernels.files import parse_json

Chat = list[dict[str, str]]
"""Messages, each with its role and its content."""

JSON_LINES = ".jsonl"
TEXT, CHAT = "text", "messages"
_MESSAGE_KEYS = ("role", "content")
_BETWEEN = "\n\n"

logger = logging.getLogger(__name__)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        QuantizeError: no such file, or not UTF-8; names the file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise QuantizeError(f"{path}: {reason}") from None


def read_documents(path: Path) -> list[str | Chat]:
    """The documents of a file: one, unless its name ends in .jsonl.

    Of such a file, every line is an object with "text", a string, or with "messages", a chat of
    objects with "role" and "content". Other keys are not read, nor empty lines.

    Raises:
        QuantizeError: no such file, not UTF-8, no document in it, or a line is another object;
            names file and line.
        FileError: a line is not a JSON object; names file and line.
    """
    text = read_text(path)
    if path.suffix != JSON_LINES:
        return [text]
    lines = enumerate(text.split("\n"), 1)  # splitlines() would also split within strings
    documents = [_document(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not documents:
        raise QuantizeError(f"{path}: empty, expected a document on every line")
    return documents


def _document(line: str, place: str) -> str | Chat:
    values = parse_json(line.encode(), Path(place))
    text, chat = values.get(TEXT), values.get(CHAT)
    if isinstance(text, str) and chat is None:
        return text
    if text is None and _is_chat(chat):
        return [{key: message[key] for key in _MESSAGE_KEYS} for message in chat]
    raise QuantizeError(
        f'{place}: {shortened(line, 80)}, expected "{TEXT}", a string, or "{CHAT}", a list of '
        'objects with "role" and "content", both strings'
    )


def _is_chat(value: object) -> TypeGuard[Chat]:
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(message, dict) and all(isinstance(message.get(k), str) for k in _MESSAGE_KEYS)
        for message in value
    )


def as_texts(documents: list[str | Chat], tokenizer: Any = None) -> list[str]:
    """The texts of documents, that between them included; chats as the model's template has them.

    Without a template, or where it refuses one of the chats, all chats are roles and contents with
    colons between them.

    Args:
        tokenizer: of the model, from transformers; None for no template.
    """
    chats = [document for document in documents if not isinstance(document, str)]
    rendered = iter(_rendered(chats, tokenizer) if chats else [])
    texts = [d if isinstance(d, str) else next(rendered) for d in documents]
    return [text + _BETWEEN for text in texts[:-1]] + texts[-1:]


def _rendered(chats: list[Chat], tokenizer: Any) -> list[str]:
    if getattr(tokenizer, "chat_template", None):
        try:
            texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            return [_without_beginning(text, tokenizer.bos_token) for text in texts]
        except Exception as error:  # a template may raise anything; many have no system role
            if is_out_of_memory(error):
                raise
            logger.warning("chats are read as plain text: the template refuses one (%s)", error)
    return [_BETWEEN.join(f"{m['role']}: {m['content']}" for m in chat) for chat in chats]


def _without_beginning(text: str, bos: str | None) -> str:
    """A chat without BOS: each window of the text has its own.

    Where it is there more than once it begins every message, as SmolLM2's, and stays.
    """
    return text.removeprefix(bos) if bos and text.count(bos) == 1 else text
