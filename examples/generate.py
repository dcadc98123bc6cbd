"""Batch generation without a server: ``python -m examples.generate CHECKPOINT [PROMPT ...]``."""

import sys
from collections.abc import Sequence
from typing import Any

PROMPTS = ("The capital of France is", "Water boils at", "def fibonacci(n):")


def main(checkpoint: str, prompts: Sequence[str], **options: Any) -> None:
    """Print a greedy continuation of every prompt; all are generated together.

    Args:
        options: of the engine, such as dtype="float32", which is many times as fast on a CPU
            without AVX-512, or enforce_eager=True, which starts sooner and runs more slowly.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(checkpoint, max_model_len=512, **options)
    greedy = SamplingParams(temperature=0, max_tokens=32)
    for output in llm.generate(list(prompts), greedy):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or PROMPTS)
