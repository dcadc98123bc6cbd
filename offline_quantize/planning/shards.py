"""Which tensors go into which output file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offline_quantize.model.checkpoint import TensorInfo

MAX_SHARD_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Shard:
    """One output file.

    Attributes:
        file: its name.
        tensors: what it will hold, in order of writing.
        layers: the decoder layers that it holds; empty for tensors outside the layers.
    """

    file: str
    tensors: tuple[TensorInfo, ...]
    layers: range

    @property
    def num_bytes(self) -> int:
        """Of all tensors, without the file's header."""
        return total_bytes(self.tensors)


def total_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of some tensors together."""
    return sum(info.num_bytes for info in tensors)


def make_shards(
    tensors_by_layer: Sequence[Sequence[TensorInfo]],
    outside: Iterable[TensorInfo],
    max_bytes: int,
) -> tuple[Shard, ...]:
    """Distribute tensors over files of at most ``max_bytes``, unless one layer or tensor is larger.

    Args:
        tensors_by_layer: for every decoder layer, what is written for it; a layer is never split.
        outside: the tensors outside the layers, which come after them in files of their own.
    """
    in_layers = [(tensors, range(i, i + 1)) for i, tensors in enumerate(tensors_by_layer)]
    parts = _fill(in_layers, max_bytes)
    parts += _fill([([info], range(0)) for info in outside], max_bytes)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(parts):05d}.safetensors", tuple(tensors), layers)
        for i, (tensors, layers) in enumerate(parts, 1)
    )


def _fill(
    items: Iterable[tuple[Sequence[TensorInfo], range]], max_bytes: int
) -> list[tuple[list[TensorInfo], range]]:
    """Put neighboring items together while they fit."""
    parts: list[tuple[list[TensorInfo], range]] = []
    filled = 0  # bytes of the last part
    for tensors, layers in items:
        num_bytes = total_bytes(tensors)
        if parts and filled + num_bytes <= max_bytes:
            together, before = parts[-1]
            together.extend(tensors)
            parts[-1] = (together, range(before.start, layers.stop))
            filled += num_bytes
        else:
            parts.append((list(tensors), layers))
            filled = num_bytes
    return parts
