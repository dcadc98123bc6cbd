"""The tokenizer of a model, loaded after another process has tried it on the text.

tokenizer.json may ask for anything, such as a normalizer that doubles the text forty times. So a
separate process tries first, within limits. It imports only ``tokenizers``, and starts quickly.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offline_quantize.errors import QuantizeError, is_out_of_memory, shortened
from offline_quantize.model.limited import BASE_SECONDS, EndedError, receive, run_limited
from qamw_kernels.files import MAX_JSON_BYTES

TOKENIZER = "tokenizer.json"


def load_tokenizer(
    directory: Path, texts: Sequence[str], base_seconds: float = BASE_SECONDS
) -> Any:
    """transformers' tokenizer of a model; no code of the model runs.

    Args:
        texts: that it will be used for.
        base_seconds: time limit for an empty text.
    Raises:
        QuantizeError: there is none, or it cannot be used for these texts.
    """
    read = (".json", ".model", ".txt", ".jinja")
    for path in directory.iterdir():
        if path.suffix in read and path.stat().st_size > MAX_JSON_BYTES:
            raise QuantizeError(
                f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}"
            )
    try_tokenizer(directory, texts, base_seconds)
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers fail in many ways; all mean the same here
        if is_out_of_memory(error):
            raise
        raise QuantizeError(
            f"{directory}: no usable tokenizer: is {TOKENIZER} there? ({shortened(error)})"
        ) from None


def try_tokenizer(
    directory: Path, texts: Sequence[str], base_seconds: float = BASE_SECONDS
) -> None:
    """Have another process tokenize texts, if the model has a tokenizer.json.

    Raises:
        QuantizeError: it took too much memory or time, or the process crashed.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        return
    text_bytes = sum(len(text.encode()) for text in texts)
    try:
        run_limited(__name__, [str(path), texts], text_bytes, base_seconds)
    except EndedError as how:
        raise QuantizeError(
            f"{path}: this tokenizer cannot tokenize {text_bytes} bytes of text: {how}"
        ) from None


def _main() -> None:
    """What the other process does.

    Ordinary errors are ignored: transformers will report them itself.
    """
    file, texts = receive()
    try:
        from tokenizers import Tokenizer

        Tokenizer.from_file(file).encode_batch(texts, add_special_tokens=False)
    except MemoryError:
        raise
    except Exception:
        pass


if __name__ == "__main__":
    _main()
