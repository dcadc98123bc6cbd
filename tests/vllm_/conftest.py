"""Fixtures for layers of vLLM without an engine."""

import logging
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the tensor-parallel rank and size that vLLM's layers see.

    Layers of several ranks are then used one after another.
    """
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def choose(tp_rank: int, tp_size: int) -> None:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: tp_rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: tp_size)

    choose(0, 1)
    return choose


@pytest.fixture
def one_rank() -> Iterator[None]:
    """vLLM's process groups with only this process: vLLM's experts ask for them."""
    from tests.helpers.vllm_rank import tensor_parallel_rank

    with tensor_parallel_rank():
        yield


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the plugin logs, from level INFO on."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("vllm.qamw_vllm"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
