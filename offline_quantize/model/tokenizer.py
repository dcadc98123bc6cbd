"""The tokenizer of a model, once another process has seen what it makes of the text.

tokenizer.json may ask for anything, such as a normalizer that doubles the text forty times. The
library that obeys ends the whole process when memory runs out, and does not stop by itself. So a
process of its own tries first, within limits. It needs that library only, and starts in no time.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from offline_quantize.errors import QuantizeError, is_out_of_memory, shortened
from qamw_kernels.files import MAX_JSON_BYTES

TOKENIZER = "tokenizer.json"

# What tokenizers take is far below: some hundred bytes and less than 10 microseconds for a byte.
_BASE_BYTES, _BYTES_PER_BYTE = 4 * 2**30, 2**12
BASE_SECONDS, _SECONDS_PER_BYTE = 120, 1e-4


def load_tokenizer(
    directory: Path, texts: Sequence[str], base_seconds: float = BASE_SECONDS
) -> Any:
    """transformers' tokenizer of a model; no code of the model runs.

    Args:
        texts: that it will be used for.
        base_seconds: that it may take for an empty text.
    Raises:
        QuantizeError: there is none, or it cannot be used for these texts.
    """
    for path in directory.iterdir():
        if path.suffix in (".json", ".model", ".txt") and path.stat().st_size > MAX_JSON_BYTES:
            raise QuantizeError(
                f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}"
            )
    if (directory / TOKENIZER).is_file():
        _try(directory / TOKENIZER, texts, base_seconds)
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


def _try(path: Path, texts: Sequence[str], base_seconds: float) -> None:
    """Have another process tokenize texts.

    Raises:
        QuantizeError: it took too much memory or time, or was ended by the attempt.
    """
    text_bytes = sum(len(text.encode()) for text in texts)
    num_bytes = _BASE_BYTES + _BYTES_PER_BYTE * text_bytes
    seconds = base_seconds + _SECONDS_PER_BYTE * text_bytes
    command = [sys.executable, "-P", "-m", __name__, str(path), str(num_bytes)]
    try:
        code = subprocess.run(
            command,
            input=json.dumps(texts).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ).returncode
    except subprocess.TimeoutExpired:
        how = f"it was stopped after {seconds:.0f} s"
    else:
        if not code:
            return
        ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        how = f"the process ended with {ended}; it had {num_bytes / 2**30:.1f} GiB of memory"
    raise QuantizeError(f"{path}: this tokenizer cannot tokenize {text_bytes} bytes of text: {how}")


def _main(file: str, num_bytes: str) -> None:
    """What the other process does.

    Whatever is an error of the usual kind, transformers will say in its own words.
    """
    with suppress(ValueError, OSError):  # less is allowed already
        resource.setrlimit(resource.RLIMIT_DATA, (int(num_bytes), int(num_bytes)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    texts = json.load(sys.stdin.buffer)
    try:
        from tokenizers import Tokenizer

        Tokenizer.from_file(file).encode_batch(texts, add_special_tokens=False)
    except MemoryError:
        raise
    except Exception:
        pass


if __name__ == "__main__":
    _main(*sys.argv[1:])
