"""Text -> windows of tokens, in four conventions of published perplexities. They differ by several percent: label figures.

``gptq-2048``: lines joined as the rows of the datasets library, tokenised once, disjoint windows of 2048, all but the first
token scored. ``hf-stride``: the same text, a window of 2048 every 512 tokens, only tokens scored that no window before had.
``llama.cpp-512``: the raw text, disjoint windows of 512, the last 255 tokens scored. ``lm-eval``: the task ``wikitext`` of
lm-evaluation-harness: detokenised pages, rolling windows of the model's whole context, perplexity per word.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from offline_quantize.errors import QuantizeError

BOS_RULE = ("auto: BOS leads every window for the Gemma family, which needs it; otherwise it stands where the tokenizer puts it by "
            "itself: nowhere, or at the start of the text and, as in llama.cpp, of every llama.cpp-512 window. yes: it leads every "
            "window. no: nowhere. In lm-eval BOS, or EOS where there is none, leads every page, as in the harness")

Together = Iterator[list["Window"]]  # windows that only make sense together


@dataclass(frozen=True)
class Window:
    """Tokens, of which the last ones are scored.

    Attributes:
        token_ids: the model reads all but the last.
        num_scored: how many of the last tokens are predicted, each from all before it.
        num_units: its share of what the log-perplexity is divided by: scored tokens, or words for lm-eval.
    """

    token_ids: list[int]
    num_scored: int
    num_units: float


@dataclass(frozen=True)
class Bos:
    """Where the beginning-of-sequence token goes by BOS_RULE; ``start_of_text`` is what the tokenizer does by itself."""

    token_id: int | None
    every_window: bool
    start_of_text: bool

    @staticmethod
    def choose(tokenizer: Any, model_type: str, option: str) -> "Bos":
        """Apply BOS_RULE; ``option`` is auto, yes or no.

        Raises:
            QuantizeError: yes, and the tokenizer has no BOS.
        """
        token_id = tokenizer.bos_token_id
        if token_id is None and option == "yes":
            raise QuantizeError(f"--bos yes: the tokenizer of {tokenizer.name_or_path} has no BOS token")
        every_window = option == "yes" or (option == "auto" and token_id is not None and model_type.startswith("gemma"))
        by_itself = token_id is not None and tokenizer("a")["input_ids"][0] == token_id
        return Bos(token_id, every_window, by_itself and option != "no")

    def __str__(self) -> str:
        return "every window" if self.every_window else "start of the text" if self.start_of_text else "none"


@dataclass(frozen=True)
class Text:
    """A text with all that decides how it becomes windows.

    Attributes:
        raw: the text as it is in its file. context: the most tokens that the model can read.
    """

    raw: str
    tokenizer: Any
    bos: Bos
    context: int

    def windows(self, convention: str, limit: int | None = None) -> list[Window]:
        """The windows of a convention; no more once there are ``limit`` (lm-eval: once the page is complete).

        Raises:
            QuantizeError: the text is too short, or a window longer than the model's context.
        """
        windows: list[Window] = []
        for together in CONVENTIONS[convention](self):
            windows += together
            if limit is not None and len(windows) >= limit:
                break
        if not windows:
            raise QuantizeError(f"the text is too short for one window of {convention}: it has {len(self.encode(self.raw))} tokens")
        longest = max(len(window.token_ids) - 1 for window in windows)
        if longest > self.context:
            raise QuantizeError(f"{convention} has the model read {longest} tokens at once, but its context is {self.context}: "
                                "choose another --convention")
        return windows

    def encode(self, string: str, bos: bool = False) -> list[int]:
        """Token ids of ``string``, led by BOS on request."""
        return [self.bos.token_id] * bos + self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]


def _joined_ids(text: Text) -> tuple[list[int], list[int]]:
    """Token ids of the lines joined as the datasets library's rows, and what leads every window of them."""
    joined = "\n\n".join(line + "\n" if line.strip() else "" for line in text.raw.removesuffix("\n").split("\n"))
    every = text.bos.every_window
    return text.encode(joined, bos=text.bos.start_of_text and not every), text.encode("", bos=every)


def _gptq(text: Text, length: int = 2048) -> Together:
    ids, lead = _joined_ids(text)
    for start in range(0, len(ids) - length + 1, length):
        window = lead + ids[start : start + length]
        yield [Window(window, len(window) - 1, len(window) - 1)]


def _hf_stride(text: Text, length: int = 2048, stride: int = 512) -> Together:
    ids, lead = _joined_ids(text)
    scored = 0 if lead else 1  # the very first token has nothing before it but BOS
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        if end > scored:
            yield [Window(lead + ids[start:end], end - scored, end - scored)]
            scored = end


def _llama_cpp(text: Text, length: int = 512) -> Together:
    bos = text.bos.every_window or text.bos.start_of_text
    ids = text.encode(text.raw, bos)
    for start in range(0, len(ids) - length + 1, length):  # BOS takes the place of a window's first token
        yield [Window(text.encode("", bos) + ids[start + bos : start + length], length // 2 - 1, length // 2 - 1)]


def _lm_eval(text: Text) -> Together:
    prefix = text.tokenizer.eos_token_id if text.bos.token_id is None else text.bos.token_id
    if prefix is None:
        raise QuantizeError(f"lm-eval: the tokenizer of {text.tokenizer.name_or_path} has neither BOS nor EOS to lead a page with")
    for page in _pages(text.raw):
        num_words = len(re.split(r"\s+", page))  # before detokenising
        ids = [prefix, *text.encode(detokenized(page), text.bos.start_of_text)]
        together = []
        for start in range(1, len(ids), text.context):
            end = min(start + text.context, len(ids))
            together.append(Window(ids[max(0, end - text.context - 1) : end], end - start, num_words * (end - start) / (len(ids) - 1)))
        yield together


def _pages(raw: str) -> Iterator[str]:
    """The pages of a WikiText file, each from its heading `` = Title = `` on; a text without headings is one page."""
    page: list[str] = []
    for line in raw.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            if any(part.strip() for part in page):
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


_DETOKENIZE = [(re.compile(pattern), replacement) for pattern, replacement in (
    ("s '", "s'"), ("/' [0-9]/", "/'[0-9]/"),  # the second is a slip of the harness, kept
    (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (r" \. ", ". "), (" ! ", "! "), (r" \? ", "? "), (" , ", ", "),  # one after the other: "a , : b"
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)]


def detokenized(page: str) -> str:
    """A page of WikiText with its spaced-out punctuation drawn together, by the rules of lm-evaluation-harness."""
    for pattern, replacement in _DETOKENIZE:
        page = pattern.sub(replacement, page)
    return page


CONVENTIONS: dict[str, Callable[[Text], Together]] = {
    "gptq-2048": _gptq, "hf-stride": _hf_stride, "llama.cpp-512": _llama_cpp, "lm-eval": _lm_eval,
}
