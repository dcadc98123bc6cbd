"""Text -> windows of tokens, in four conventions of published perplexities.

They differ by several percent: name the convention beside every figure.

- ``gptq-2048``: lines joined like the rows of the datasets library, tokenized once, disjoint
  windows of 2048 tokens, all but the first token scored.
- ``hf-stride``: the same text, a window of 2048 tokens every 512 tokens; each window scores only
  the tokens that no earlier window has.
- ``llama.cpp-512``: the raw text, disjoint windows of 512 tokens, the last 255 tokens scored.
- ``lm-eval``: the task ``wikitext`` of lm-evaluation-harness: detokenized pages, rolling windows of
  the model's whole context, perplexity per word.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_quantize.errors import Option, QuantizeError, explained
from offline_quantize.evaluation.wikitext import detokenized, pages
from offline_quantize.files import CONFIG
from offline_quantize.model.tokenizer import load_tokenizer
from qamw_kernels.files import read_json

BOS_RULE = (
    "auto: every window of the Gemma family, which needs it, begins with BOS; for other models it "
    "stays where the tokenizer puts it: nowhere, or at the start of the text and, as in llama.cpp, "
    "of every llama.cpp-512 window. yes: every window begins with it. no: there is none. With "
    "lm-eval, every page begins with BOS, or with EOS if there is no BOS, as in the harness"
)
BOS_OPTIONS = ("auto", "yes", "no")
DEFAULT_CONTEXT = 2048  # of a model whose config.json names none; as in lm-evaluation-harness

WindowGroups = Iterator[list["Window"]]  # a group is windows that only make sense together


@dataclass(frozen=True)
class Window:
    """Tokens, of which the last ones are scored.

    Attributes:
        token_ids: the model reads all but the last.
        num_scored: how many of the last tokens are predicted, each from all before it.
        num_units: its share of what the log-perplexity is divided by: scored tokens, or words for
            lm-eval.
    """

    token_ids: list[int]
    num_scored: int
    num_units: float


@dataclass(frozen=True)
class Bos:
    """Where the beginning-of-sequence token goes by BOS_RULE.

    Attributes:
        token_id: None if the tokenizer has no such token.
        every_window: whether it leads every window.
        start_of_text: whether it leads the text, as the tokenizer does by itself.
    """

    token_id: int | None
    every_window: bool
    start_of_text: bool

    @staticmethod
    def choose(tokenizer: Any, model_type: str, option: str) -> "Bos":
        """Apply BOS_RULE.

        Args:
            tokenizer: of transformers.
            model_type: of config.json.
            option: one of BOS_OPTIONS.
        Raises:
            QuantizeError: yes, and the tokenizer has no BOS.
        """
        token_id = tokenizer.bos_token_id
        if token_id is None and option == "yes":
            raise QuantizeError(
                Option("bos", option),
                f": the tokenizer of {tokenizer.name_or_path} has no BOS token",
            )
        needs_it = token_id is not None and model_type.startswith("gemma")
        every_window = option == "yes" or (option == "auto" and needs_it)
        by_itself = token_id is not None and tokenizer("a")["input_ids"][:1] == [token_id]
        return Bos(token_id, every_window, by_itself and option != "no")

    def __str__(self) -> str:
        if self.every_window:
            return "every window"
        return "start of the text" if self.start_of_text else "none"


@dataclass(frozen=True)
class Text:
    """A text with all that decides how it becomes windows.

    Attributes:
        raw: the text as it is in its file.
        tokenizer: of transformers.
        bos: where BOS goes.
        context: the most tokens that the model can read.
    """

    raw: str
    tokenizer: Any
    bos: Bos
    context: int

    def windows(self, convention: str, limit: int | None = None) -> list[Window]:
        """The windows of a convention.

        Args:
            convention: a key of CONVENTIONS.
            limit: number of windows after which no more are made; in lm-eval, the page is completed
                first.
        Raises:
            QuantizeError: the text is too short, or a window longer than the model's context.
        """
        windows: list[Window] = []
        for group in CONVENTIONS[convention](self):
            windows += group
            if limit is not None and len(windows) >= limit:
                break
        if not windows:
            raise QuantizeError(
                f"the text is too short for one window of {convention}: "
                f"it has {len(self.encode(self.raw))} tokens"
            )
        longest = max(len(window.token_ids) - 1 for window in windows)
        if longest > self.context:
            raise QuantizeError(
                f"{convention} needs {longest} tokens of context, "
                f"but the context of the model is {self.context}: choose another ",
                Option("convention"),
            )
        return windows

    def encode(self, string: str, bos: bool = False) -> list[int]:
        """Token ids of ``string``; ``bos`` puts the BOS token before them, if there is one."""
        encoded = self.tokenizer(string, add_special_tokens=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return [self.bos.token_id, *ids] if bos and self.bos.token_id is not None else ids


def open_text(raw: str, directory: Path, bos: str) -> tuple[Text, int]:
    """The text as a checkpoint's tokenizer and config.json see it; no weights are read.

    Args:
        raw: the text as it is in its file.
        directory: of the checkpoint.
        bos: one of BOS_OPTIONS.
    Returns:
        The text, and ``vocab_size`` of config.json.
    Raises:
        FileError, QuantizeError: config.json or the tokenizer cannot be used.
    """
    from transformers import AutoConfig  # slow to import

    read_json(directory / CONFIG)  # transformers is less careful
    with explained(f"{directory / CONFIG}: transformers cannot use it"):
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        ).get_text_config()
    tokenizer = load_tokenizer(directory, [raw])
    context = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    chosen = Bos.choose(tokenizer, config.model_type, bos)
    return Text(raw, tokenizer, chosen, context), config.vocab_size


def _joined_ids(text: Text) -> tuple[list[int], list[int]]:
    """Token ids of lines joined like the datasets library's rows; and what leads each window."""
    lines = text.raw.removesuffix("\n").split("\n")
    joined = "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    every = text.bos.every_window
    ids = text.encode(joined, bos=text.bos.start_of_text and not every)
    return ids, text.encode("", bos=every)


def _gptq(text: Text, length: int = 2048) -> WindowGroups:
    ids, lead = _joined_ids(text)
    for start in range(0, len(ids) - length + 1, length):
        window = lead + ids[start : start + length]
        yield [Window(window, len(window) - 1, len(window) - 1)]


def _hf_stride(text: Text, length: int = 2048, stride: int = 512) -> WindowGroups:
    ids, lead = _joined_ids(text)
    scored = 0 if lead else 1  # the very first token has nothing before it except BOS
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        if end > scored:
            yield [Window(lead + ids[start:end], end - scored, end - scored)]
            scored = end


def _llama_cpp(text: Text, length: int = 512) -> WindowGroups:
    bos = text.bos.every_window or text.bos.start_of_text
    ids = text.encode(text.raw, bos)
    num_scored = length // 2 - 1
    for start in range(0, len(ids) - length + 1, length):
        # BOS takes the place of a window's first token.
        window = text.encode("", bos) + ids[start + bos : start + length]
        yield [Window(window, num_scored, num_scored)]


def _lm_eval(text: Text) -> WindowGroups:
    tokenizer, context = text.tokenizer, text.context
    prefix = tokenizer.eos_token_id if text.bos.token_id is None else text.bos.token_id
    if prefix is None:
        raise QuantizeError(
            f"lm-eval: the tokenizer of {tokenizer.name_or_path} has neither BOS nor EOS "
            "to begin a page with"
        )
    for page in pages(text.raw):
        num_words = len(re.split(r"\s+", page))  # before detokenizing
        ids = [prefix, *text.encode(detokenized(page), text.bos.start_of_text)]
        windows = []
        for start in range(1, len(ids), context):
            end = min(start + context, len(ids))
            num_units = num_words * (end - start) / (len(ids) - 1)
            windows.append(Window(ids[max(0, end - context - 1) : end], end - start, num_units))
        yield windows


CONVENTIONS: dict[str, Callable[[Text], WindowGroups]] = {
    "gptq-2048": _gptq,
    "hf-stride": _hf_stride,
    "llama.cpp-512": _llama_cpp,
    "lm-eval": _lm_eval,
}
