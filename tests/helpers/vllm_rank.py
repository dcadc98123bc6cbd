"""vLLM in this process alone, which may act as one of several ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)


@contextmanager
def tensor_parallel_rank(
    rank: int = 0, size: int = 1, config: VllmConfig | None = None
) -> Iterator[None]:
    """vLLM's groups of processes, and its config, inside a block.

    The groups contain only this process, but code that asks for the tensor-parallel rank and size
    gets these arguments. That is enough to make and load a model, if no rank talks to the others.

    Args:
        rank: of ``size`` tensor-parallel ranks.
        config: None for vLLM's defaults.
    """
    with set_current_vllm_config(config or VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        try:
            initialize_model_parallel()
            group = get_tp_group()
            group.rank_in_group, group.world_size = rank, size
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
