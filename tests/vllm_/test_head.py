"""A quantized head in vLLM."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from qamw_vllm.head import vocabulary_loader


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_without_a_word_are_zero(dim: int) -> None:
    """Whatever was in memory before: vLLM's reload hands over parameters that nobody has filled."""
    indices = SimpleNamespace(org_vocab_start_index=4, org_vocab_end_index=7)
    layer = SimpleNamespace(shard_indices=indices)
    empty = torch.full((2, 5) if dim else (5,), torch.nan)
    param = torch.nn.Parameter(empty, requires_grad=False)
    loaded = torch.arange(20.0).view(2, 10) if dim else torch.arange(10.0)
    vocabulary_loader(layer, dim)(param, loaded)
    expected = [[4, 5, 6, 0, 0], [14, 15, 16, 0, 0]][: 1 + dim]
    assert param.data.view(-1, 5).tolist() == expected
