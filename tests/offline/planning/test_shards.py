"""How tensors are distributed over output files."""

import torch

from offline_quantize.model.checkpoint import TensorInfo
from offline_quantize.planning.shards import make_shards


def tensor(name: str, num_bytes: int) -> TensorInfo:
    return TensorInfo(name, "", (num_bytes,), torch.uint8)


def test_layers_are_whole_and_what_is_outside_comes_last() -> None:
    layers = [[tensor(f"{i}.a", 30), tensor(f"{i}.b", 20)] for i in range(3)]
    outside = [tensor("embed", 90), tensor("norm", 10), tensor("head", 1)]
    shards = make_shards(layers, outside, max_bytes=100)
    assert [[info.name for info in shard.tensors] for shard in shards] == [
        ["0.a", "0.b", "1.a", "1.b"],
        ["2.a", "2.b"],
        ["embed", "norm"],
        ["head"],
    ]
    assert [list(shard.layers) for shard in shards] == [[0, 1], [2], [], []]
    assert [shard.num_bytes for shard in shards] == [100, 50, 100, 1]
    assert shards[1].file == "model-00002-of-00004.safetensors"


def test_a_layer_larger_than_a_shard_gets_its_own() -> None:
    shards = make_shards([[tensor("0", 300)], [tensor("1", 10)]], [], max_bytes=100)
    assert [shard.num_bytes for shard in shards] == [300, 10]


def test_a_hundred_thousand_empty_tensors() -> None:
    """Time grows with their number, not with its square."""
    (shard,) = make_shards([], [tensor(str(i), 0) for i in range(100_000)], max_bytes=100)
    assert len(shard.tensors) == 100_000
