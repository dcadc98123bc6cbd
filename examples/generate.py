"""Batch generation without a server: ``python -m examples.generate CHECKPOINT [PROMPT ...]``."""

import sys
from collections.abc import Sequence

PROMPTS = ("The capital of France is", "Water boils at", "def fibonacci(n):")


def main(checkpoint: str, prompts: Sequence[str]) -> None:
    """Print a greedy continuation of every prompt; all are generated together."""
    from vllm import LLM, SamplingParams

    # On a CPU without AVX-512 add dtype="float32": it is many times as fast there.
    llm = LLM(checkpoint, max_model_len=512)
    greedy = SamplingParams(temperature=0, max_tokens=32)
    for output in llm.generate(list(prompts), greedy):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or PROMPTS)
