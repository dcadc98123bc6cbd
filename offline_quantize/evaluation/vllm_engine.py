"""Last hidden states from vLLM's own engine, so that what is served is what is measured.

Log-probabilities of whole vocabularies would be millions of Python objects. So the engine runs as a pooling model that
returns every token's state after the last norm, unnormalised, and the caller applies the head.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from offline_quantize.evaluation.conventions import Window
from offline_quantize.errors import QuantizeError

WINDOWS_AT_ONCE = 8  # whose states are in memory
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # torch has run here: its threads would not survive a fork
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for the result
    "VLLM_NO_USAGE_STATS": "1",
}


def hidden_states(directory: Path, windows: Sequence[Window], dtype: torch.dtype, device: torch.device) -> Iterator[torch.Tensor]:
    """The last hidden states [num_scored, hidden size] of every window, by vLLM serving ``directory`` in ``dtype``.

    Environment variables that are set keep their values. The engine ends with the generator.

    Raises:
        QuantizeError: vLLM is not installed or cannot serve the checkpoint.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM, PoolingParams
        from vllm.config import PoolerConfig
    except ImportError as error:
        raise QuantizeError(f"--engine vllm: vLLM cannot be imported: {error}") from None

    longest = max(len(window.token_ids) - 1 for window in windows)
    options: dict[str, Any] = {
        "runner": "pooling", "convert": "embed", "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
        "dtype": str(dtype).removeprefix("torch."), "enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True,
        "max_model_len": longest, "max_num_batched_tokens": longest}
    if device.type == "cuda":
        options["gpu_memory_utilization"] = 0.7  # the heads are there too
    try:
        llm = LLM(str(directory), **options)
    except Exception as error:  # the engine raises many kinds, and says more on standard error
        raise QuantizeError(f"{directory}: vLLM cannot serve it: {type(error).__name__}: {error}") from None
    try:
        parameters = PoolingParams(task="token_embed", use_activation=False)
        for i in range(0, len(windows), WINDOWS_AT_ONCE):
            some = windows[i : i + WINDOWS_AT_ONCE]
            prompts: Any = [{"prompt_token_ids": window.token_ids[:-1]} for window in some]
            for window, output in zip(some, llm.encode(prompts, parameters, pooling_task="token_embed", use_tqdm=False), strict=True):
                yield output.outputs.data[-window.num_scored :].to(dtype)
    finally:
        llm.llm_engine.engine_core.shutdown()
