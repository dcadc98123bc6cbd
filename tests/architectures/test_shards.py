"""The stage of tensor parallelism, with real layers of vLLM, and with faults that it must find."""

from pathlib import Path

import pytest
import torch

from tests.architectures.outcomes import Outcome
from tests.architectures.run import run
from tests.architectures.serving import ENVIRONMENT
from tests.architectures.shards import assert_same

MADE = ("build", "plan", "none", "dequantize", "calibrated")  # with scales that are not all alike


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU build, for processes that are forked from this one."""
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform

    from tests.helpers.engine_script import import_engine

    if not current_platform.is_cpu():
        pytest.skip("weights are decoded on the CPU")
    for name, value in {**ENVIRONMENT, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    import_engine()


def outcome_of(name: str, folder: Path) -> Outcome:
    """How the stage ends for an architecture."""
    (record,) = run([name], folder, folder / "records", [*MADE, "tensor_parallel"])
    return record.stages["tensor_parallel"]


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_ranks_load_the_dequantized_weights(tmp_path: Path) -> None:
    """Of Mamba-2, both ranks have the one group of states."""
    assert outcome_of("mamba2", tmp_path) == Outcome("passed")


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_what_another_rank_should_load_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qamw_vllm.loading import linear

    def first(tensor: torch.Tensor, dim: int, length: int, rank: int) -> torch.Tensor:
        return tensor.narrow(dim, 0, length)

    monkeypatch.setattr(linear, "slice_of_rank", first)
    outcome = outcome_of("llama", tmp_path)
    assert outcome.status == "failed" and "rank 1: " in outcome.message


def test_what_differs_is_named() -> None:
    half_loaded = torch.tensor([1, torch.nan])
    assert_same({"a": half_loaded.clone()}, {"a": half_loaded})
    with pytest.raises(AssertionError, match="only one of both has"):
        assert_same({"a": half_loaded, "b": half_loaded}, {"a": half_loaded})
    with pytest.raises(AssertionError, match="a: Tensor-likes are not equal"):
        assert_same({"a": half_loaded}, {"a": torch.ones(2)})
    with pytest.raises(AssertionError, match="a: The values for attribute 'dtype'"):
        assert_same({"a": torch.ones(2)}, {"a": torch.ones(2).bfloat16()})
