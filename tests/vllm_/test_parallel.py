"""Tensor parallelism as vLLM runs it."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed import parallel_state

from qamw_vllm.backend import BackendError
from qamw_vllm.parallel import (
    check_exchange,
    num_ranks,
    slice_of_rank,
    sum_over_ranks,
    tensor_parallel_sizes_of_model,
)


def test_ranks_of_vllm_sum_and_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    group = object()
    tp_group = SimpleNamespace(device_group=group, world_size=3)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: tp_group)

    def all_reduce(tensor: torch.Tensor, group: object) -> None:
        assert group is tp_group.device_group
        tensor.mul_(3)  # of three ranks with the same values

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert num_ranks() == 3
    assert sum_over_ranks(torch.arange(3.0)).tolist() == [0, 3, 6]
    assert slice_of_rank(torch.arange(8).view(2, 4), 1, 2, 1).tolist() == [[2, 3], [6, 7]]


def test_exchanges_with_kernels_of_their_own_are_refused() -> None:
    several = {"use_ep": True, "dp_size": 2, "pcp_size": 1, "is_sequence_parallel": False}
    parallel = SimpleNamespace(
        use_all2all_kernels=True, all2all_backend="deepep_low_latency", **several
    )
    message = r"mlp\.experts: all2all_backend='deepep_low_latency' .* 'allgather_reducescatter'"
    with pytest.raises(BackendError, match=message):
        check_exchange(parallel, "mlp.experts")
    parallel.all2all_backend = "allgather_reducescatter"
    check_exchange(parallel, "mlp.experts")
    check_exchange(SimpleNamespace(**vars(parallel) | {"use_ep": False}), "mlp.experts")
    parallel.pcp_size = 2
    check_exchange(parallel, "mlp.experts")
    parallel.dp_size = 1
    with pytest.raises(BackendError, match="prefill context parallelism with expert"):
        check_exchange(parallel, "mlp.experts")


def test_sizes_without_a_model() -> None:
    assert tensor_parallel_sizes_of_model() == [1, 2, 4, 8]
