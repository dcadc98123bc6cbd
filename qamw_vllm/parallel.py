"""Parallelism as vLLM runs it: sizes of the model, sums over ranks, slices of a rank, exchanges."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import parallel_state

from qamw_kernels.format.sharding import attention_heads, possible_tensor_parallel_sizes
from qamw_vllm.backend import BackendError


def tensor_parallel_sizes_of_model() -> list[int]:
    """Sizes that the attention heads of the model that is being made allow."""
    config = get_current_vllm_config_or_none()
    model_config = None if config is None else config.model_config
    text_config = None if model_config is None else model_config.hf_text_config
    return possible_tensor_parallel_sizes(*attention_heads(text_config))


def num_ranks() -> int:
    """Number of tensor-parallel ranks, which hold parts of the same rows."""
    size: int = parallel_state.get_tp_group().world_size
    return size


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, summed in place over the tensor-parallel ranks."""
    torch.distributed.all_reduce(tensor, group=parallel_state.get_tp_group().device_group)
    return tensor


def slice_of_rank(tensor: torch.Tensor, dim: int, length: int, rank: int) -> torch.Tensor:
    """A view of the ``length`` entries of dimension ``dim`` that are this rank's."""
    return tensor.narrow(dim, rank * length, length)


EXCHANGES = ("allgather_reducescatter", "naive")
"""Supported values of vLLM's ``--all2all-backend``: the others use their own expert kernels."""


def check_exchange(parallel: Any, prefix: str) -> None:
    """Check that ranks can exchange the tokens of packed experts.

    Args:
        parallel: vLLM's ``FusedMoEParallelConfig``.
    Raises:
        BackendError: they cannot.
    """
    if parallel.use_all2all_kernels and parallel.all2all_backend not in EXCHANGES:
        raise BackendError(
            f"{prefix}: all2all_backend={parallel.all2all_backend!r} does not support packed "
            f"experts, expected {EXCHANGES[0]!r}"
        )
    # vLLM then leaves the exchange to its own kernels, which cannot multiply with packed experts.
    alone = parallel.dp_size == 1 and not parallel.is_sequence_parallel
    if parallel.use_ep and getattr(parallel, "pcp_size", 1) > 1 and alone:
        raise BackendError(
            f"{prefix}: prefill context parallelism with expert parallelism does not support "
            "packed experts, expected one of the two"
        )
