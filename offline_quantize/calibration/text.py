"""The calibration text, and the windows of its tokens that are read."""

from itertools import chain
from pathlib import Path

import torch

from offline_quantize.calibration.documents import as_texts, read_documents
from offline_quantize.errors import Option, QuantizeError
from offline_quantize.model.runner import BATCH
from offline_quantize.model.tokenizer import load_tokenizer, try_tokenizer

DEFAULT_TEXT = Path(__file__).with_name("calibration.jsonl")
MIN_TOKENS = 16384
TOKENS_PER_INPUT = 3  # of the widest layer: with fewer tokens, its Hessian is mostly noise
WINDOW_TOKENS = 512


def default_num_tokens(num_inputs: int) -> int:
    """Calibration tokens for a model whose widest layer has ``num_inputs`` inputs.

    A text that has fewer is read as a whole.
    """
    return max(MIN_TOKENS, TOKENS_PER_INPUT * num_inputs)


def calibration_windows(
    directory: Path,
    text_file: Path,
    num_tokens: int,
    at_least: int | None = None,
    window_tokens: int = WINDOW_TOKENS,
) -> torch.Tensor:
    """Windows of a text's tokens, spread evenly over it, each led by BOS if the tokenizer has one.

    Consecutive windows come from distant places in the text, so that every batch has all the kinds
    of text.

    Args:
        directory: of the model, whose tokenizer is used.
        text_file: a text, or JSON Lines; see :func:`read_documents`.
        num_tokens: of all windows, rounded up to whole windows.
        at_least: a text with fewer tokens than ``num_tokens`` is accepted if it has this many; None
            where it must have ``num_tokens``.
        window_tokens: of one window, BOS included.
    Returns:
        [windows, window_tokens] int64.
    Raises:
        QuantizeError: the text is missing, not what :func:`read_documents` expects, or too short;
            or the model has no usable tokenizer.
        FileError: a line of JSON Lines is not a JSON object.
    """
    documents = read_documents(text_file)
    try:
        tokenizer = load_tokenizer(directory, [])
        texts = as_texts(documents, tokenizer, directory)
        try_tokenizer(directory, texts)
    except QuantizeError as error:
        raise QuantizeError(*error.parts, ". Or use ", Option("calibration", None)) from None
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    tokens = torch.tensor(list(chain.from_iterable(encoded["input_ids"])), dtype=torch.long)
    if any(texts) and not len(tokens):
        raise QuantizeError(
            f"{directory}: its tokenizer finds no tokens in {text_file}: is its vocabulary empty?"
        )
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    needed = _windows_of(num_tokens if at_least is None else at_least, window_tokens)
    if len(tokens) < (least := needed * (window_tokens - len(bos))):
        count = f"{len(tokens)} tokens, at least {least} are needed"
        if at_least is None:
            raise QuantizeError(f"{text_file}: {count}")
        unless = (", unless ", Option("calibration_tokens"), " has a smaller value")
        raise QuantizeError(f"{text_file}: {count}", *unless)
    windows = spread_windows(tokens, bos, _windows_of(num_tokens, window_tokens), window_tokens)
    num_batches = -(-len(windows) // BATCH)
    return windows[sorted(range(len(windows)), key=lambda window: window % num_batches)]


def spread_windows(
    tokens: torch.Tensor, bos: list[int], num_windows: int, window_tokens: int = WINDOW_TOKENS
) -> torch.Tensor:
    """Windows of tokens [n] int64, spread evenly from the first token to the last.

    Args:
        bos: what leads every window: one token or none.
        num_windows: reduced where the tokens fill fewer windows without overlap.
        window_tokens: of one window, ``bos`` included; at most n.
    Returns:
        [windows, window_tokens] int64.
    """
    width = window_tokens - len(bos)
    num_windows = min(num_windows, len(tokens) // width)
    # Not in float32, which does not have every integer above 2**24.
    starts = torch.linspace(0, len(tokens) - width, num_windows, dtype=torch.float64).long()
    lead = torch.tensor(bos, dtype=torch.long)
    return torch.stack([torch.cat((lead, tokens[s : s + width])) for s in starts.tolist()])


def _windows_of(num_tokens: int, window_tokens: int) -> int:
    """Whole windows that hold ``num_tokens``."""
    return -(-num_tokens // window_tokens)
