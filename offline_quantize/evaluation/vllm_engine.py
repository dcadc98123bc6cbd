"""Last hidden states from vLLM's own engine, so that what is served is what is measured.

Log-probabilities of whole vocabularies would be millions of Python objects. So the engine runs as a
pooling model that returns every token's state after the last norm, not normalized, and the caller
applies the head.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from offline_quantize.errors import Option, QuantizeError
from offline_quantize.evaluation.conventions import Window

WINDOWS_AT_ONCE = 8  # whose states are in memory
GPU_MEMORY_SHARE = 0.7  # of the engine; the heads need some too
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # torch has run here: its threads cannot be forked
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for the result
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def environment_defaults(defaults: Mapping[str, str]) -> Iterator[None]:
    """While active, environment variables that are not set have these values."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def hidden_states(
    directory: Path,
    windows: Sequence[Window],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """The last hidden states of every window, by vLLM serving ``directory`` in ``dtype``.

    While the engine runs, ENVIRONMENT holds for variables that are not set. The engine ends with
    the generator.

    Args:
        device: of the heads; vLLM chooses its own.
    Yields:
        [num_scored, hidden size] in ``dtype``, of every window.
    Raises:
        QuantizeError: vLLM is not installed or cannot serve the checkpoint.
    """
    with environment_defaults(ENVIRONMENT):
        engine = _start(directory, windows, dtype, device)
        try:
            for start in range(0, len(windows), WINDOWS_AT_ONCE):
                some = windows[start : start + WINDOWS_AT_ONCE]
                for window, states in zip(some, _run(engine, some), strict=True):
                    yield states[-window.num_scored :].to(dtype)
        finally:
            engine.llm_engine.engine_core.shutdown()


def _start(
    directory: Path,
    windows: Sequence[Window],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """vLLM's ``LLM`` as a pooling model that reads the longest of the windows."""
    try:
        from vllm import LLM
        from vllm.config import PoolerConfig
    except ImportError as error:
        raise QuantizeError(
            Option("engine", "vllm"), f": vLLM cannot be imported: {error}"
        ) from None
    longest = max(len(window.token_ids) - 1 for window in windows)
    options: dict[str, Any] = {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
        "dtype": str(dtype).removeprefix("torch."),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "max_model_len": longest,
        "max_num_batched_tokens": longest,
    }
    if device.type == "cuda":
        options["gpu_memory_utilization"] = GPU_MEMORY_SHARE
    try:
        return LLM(str(directory), **options)
    except Exception as error:  # the engine raises many kinds, with details on standard error
        raise QuantizeError(
            f"{directory}: vLLM cannot serve it: {type(error).__name__}: {error}"
        ) from None


def _run(engine: Any, windows: Sequence[Window]) -> list[torch.Tensor]:
    """States [tokens read, hidden size] of every window."""
    from vllm import PoolingParams

    outputs = engine.encode(
        [{"prompt_token_ids": window.token_ids[:-1]} for window in windows],
        PoolingParams(task="token_embed", use_activation=False),
        pooling_task="token_embed",
        use_tqdm=False,
    )
    return [output.outputs.data for output in outputs]
