"""A LoRA adapter on a quantized base: ``python -m examples.lora_on_quantized_base CKPT ADAPTER``.

ADAPTER is a folder as peft saves it, trained on the plain model or on one like CKPT. Its matrices
stay as they are, beside the packed weights. A server does the same, for requests whose "model" is
NAME, with

    vllm serve CKPT --quantization qamw --enable-lora --max-lora-rank 16 --lora-modules NAME=ADAPTER
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.generate import PROMPTS


def main(checkpoint: str, adapter: str, prompts: Sequence[str], **options: Any) -> None:
    """Print a greedy continuation of every prompt, without the adapter and with it.

    Args:
        options: of the engine, see :func:`examples.generate.main`.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
    largest = max(8, 1 << (rank - 1).bit_length())  # vLLM knows 8, 16, 32 ...
    llm = LLM(checkpoint, enable_lora=True, max_lora_rank=largest, max_model_len=512, **options)
    greedy = SamplingParams(temperature=0, max_tokens=32)
    plain = llm.generate(list(prompts), greedy)
    adapted = llm.generate(list(prompts), greedy, lora_request=LoRARequest("adapter", 1, adapter))
    for without, with_adapter in zip(plain, adapted, strict=True):
        print(repr(without.prompt))
        print("  base:   ", repr(without.outputs[0].text))
        print("  adapter:", repr(with_adapter.outputs[0].text))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] or PROMPTS)
