"""What one of several tensor-parallel ranks holds of a model, loaded by vLLM in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

NUM_RANKS = 2


def tensors_of_rank(rank: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model on one of ``NUM_RANKS`` ranks, by name.

    Quantized layers have decoded theirs, as they do on a CPU.

    Args:
        options: of vLLM's engine.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from tests.helpers.vllm_rank import tensor_parallel_rank

    config = EngineArgs(**options, tensor_parallel_size=NUM_RANKS).create_engine_config()
    with tensor_parallel_rank(rank, NUM_RANKS, config), _unpacked(), _no_leftovers():
        model = get_model(vllm_config=config)
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def _unpacked() -> Iterator[None]:
    """Weights stay as they were loaded, where vLLM would pack them for its CPU kernels."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    def multiply_plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    with (
        patch.object(utils, "dispatch_cpu_unquantized_gemm", multiply_plain),
        patch.object(UnquantizedFusedMoEMethod, "_setup_kernel"),
    ):
        yield


@contextmanager
def _no_leftovers() -> Iterator[None]:
    """Memory that nothing was loaded into holds NaN, not what an earlier model had there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names with the same values, bit for bit.

    Decoding computes every row on its own, and within it every rotation block: so a part of a
    decoded matrix has the very values of a decoded part.
    """
    if found.keys() != expected.keys():
        raise AssertionError(f"only one of both has {sorted(found.keys() ^ expected.keys())[:3]}")
    for name, tensor in expected.items():
        try:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
