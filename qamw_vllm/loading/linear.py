"""What the checkpoint delivers for one layer, linear or of experts: checked on arrival, counted, and complaining about what is missing.

vLLM leaves uninitialised memory where a quantised checkpoint lacks a tensor, and its own shape checks are assertions
without names; both are caught here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from qamw_kernels.codec.encode import check_input_scales, check_row_norms
from qamw_kernels.format.config import LAYER_TENSORS, layer_tensors

_QKV = {"q": 0, "k": 1, "v": 2}
_MATRICES = {"w1": ("w13", 0), "w3": ("w13", 1), "w2": ("w2", 0)}  # vLLM's shard ids of experts -> parameter, and position in it

ShardId = int | str | tuple[int, ...] | None
Loader = Callable[..., None]


class LayerLoader:
    """Loaders for the tensors of one vLLM linear layer, on one tensor-parallel rank.

    Args:
        layer: the layer, a LinearBase of vLLM.
        parts: names of the checkpoint's modules that the layer holds; one name for a layer that is fused on disk too.
        index_bits: bits per pair of all parts.
        num_inputs: inputs of the whole layer, not of this rank's shard.
        num_shards: how many matrices vLLM stacks in the layer.
    """

    def __init__(self, layer: Any, parts: tuple[str, ...], index_bits: int, num_inputs: int, num_shards: int) -> None:
        self.layer = layer
        self.names = parts if len(parts) == num_shards else parts[:1] * num_shards
        self.index_bits = index_bits
        self.num_inputs = num_inputs
        self.arrived: set[tuple[str, int]] = set()

    def shards_of(self, shard_id: ShardId) -> tuple[int, ...]:
        """Positions of the matrices that a loader's shard id stands for; all of them for None."""
        if shard_id is None:
            return tuple(range(len(self.names)))
        if isinstance(shard_id, tuple):
            return shard_id
        return (_QKV[shard_id] if isinstance(shard_id, str) else shard_id,)

    def wrap(self, tensor: str, load: Loader) -> Loader:
        """``load``, one of vLLM's loaders, with the checks before and the arrival noted after it."""

        def loader(param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
            shards = self.shards_of(loaded_shard_id)
            if tensor in LAYER_TENSORS:
                self._check(tensor, loaded_weight, shards)
            # Not every loader of vLLM takes a shard id.
            load(param, loaded_weight) if loaded_shard_id is None else load(param, loaded_weight, loaded_shard_id)
            self.arrived.update((tensor, shard) for shard in shards)

        return loader

    def load_input_scales(self, param: Parameter, loaded: torch.Tensor, shard_id: Any = None) -> None:
        """Copy one vector [K] into its rows of ``param`` [num_shards, K of this rank].

        vLLM has no parameter for a vector over the inputs that every stacked matrix brings along.
        """
        num_inputs = param.shape[1]
        if num_inputs != self.num_inputs:  # row parallel: this rank's slice of the inputs
            loaded = loaded.narrow(0, self.layer.tp_rank * num_inputs, num_inputs)
        for shard in self.shards_of(shard_id):
            param.data[shard].copy_(loaded)

    def check_complete(self, tensors: tuple[str, ...]) -> None:
        """Refuse a layer that lacks one of these tensors, or its bias; the arrivals are forgotten, for a later reload."""
        if getattr(self.layer, "bias", None) is not None:
            tensors = (*tensors, "bias")
        missing = {f"{name}.{tensor}": None for shard, name in enumerate(self.names) for tensor in tensors
                   if (tensor, shard) not in self.arrived}
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
        self.arrived.clear()

    def verify(self) -> None:
        """Refuse a layer that is incomplete or holds impossible values.

        Indices need no check: every pattern of ``index_bits`` bits is a codeword.

        Raises:
            ValueError: names the tensor, what was expected and what was found.
        """
        self.check_complete(LAYER_TENSORS)
        try:
            check_row_norms(self.layer.row_norms.data)
        except ValueError as error:
            raise ValueError(f"{self._where()}.{error} of this rank") from None
        input_scales = self.layer.input_scales.data
        for name, scales in zip(self.names, input_scales, strict=True):
            try:
                check_input_scales(scales)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from None
            if not torch.equal(scales, input_scales[0]):
                raise ValueError(f"{name}.input_scales differs from {self.names[0]}.input_scales: modules that vLLM fuses read "
                                 f"the same activation and must share one vector")

    def _where(self) -> str:
        return " / ".join(dict.fromkeys(self.names))

    def _check(self, tensor: str, loaded: torch.Tensor, shards: tuple[int, ...]) -> None:
        rows = _rows_on_disk(self.layer, shards)
        if rows is None:
            rows = loaded.shape[min(1, loaded.ndim - 1)] if loaded.ndim else 0
        shape, dtype = layer_tensors(rows, self.num_inputs, self.index_bits)[tensor]
        if tuple(loaded.shape) != shape or loaded.dtype != dtype:
            raise ValueError(f"{self.names[shards[0]]}.{tensor}: expected shape {shape} {dtype} for {self.index_bits} index bits, "
                             f"the checkpoint has {tuple(loaded.shape)} {loaded.dtype}")


def _rows_on_disk(layer: Any, shards: tuple[int, ...]) -> int | None:
    """Output features that ``shards`` of a layer have in the checkpoint, or None where a model's own class decides."""
    if type(layer) is QKVParallelLinear:
        heads = layer.total_num_heads, layer.total_num_kv_heads  # output_sizes counts replicated kv heads
        sizes = [heads[0] * layer.head_size, heads[1] * layer.head_size, heads[1] * getattr(layer, "v_head_size", layer.head_size)]
    elif type(layer) is MergedColumnParallelLinear:
        sizes = layer.output_sizes
    elif isinstance(layer, ParallelLMHead):
        sizes = [layer.org_vocab_size]
    elif type(layer) in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear):
        sizes = [layer.output_size]
    else:
        return None
    return sum(sizes[shard] for shard in shards)


def name_some(names: list[str]) -> str:
    """The first few, and how many more."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class ExpertsLoader:
    """Takes in the tensors of the experts of one layer on one rank: checked on arrival, counted, complaining about what is missing.

    Args:
        layer: vLLM's RoutedExperts. prefix: the experts' name in the checkpoint. names: shard id -> the matrix' name there.
        shapes: shard id -> (N, K, index bits) in the checkpoint.
    """

    def __init__(self, layer: Any, prefix: str, names: dict[str, str], shapes: dict[str, tuple[int, int, int]]) -> None:
        self.layer, self.prefix, self.names, self.shapes = layer, prefix, names, shapes
        self.arrived: set[tuple[int, str, str]] = set()  # expert on this rank, shard id, tensor

    def wrap(self, load_weights: Any) -> Any:
        """vLLM's loader of the whole layer, which takes a tensor of three dimensions for one of all experts: planes get a fourth."""

        def load(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
            return load_weights((name, tensor[None] if name.endswith(".qweight") else tensor) for name, tensor in weights)

        return load

    def load(self, param: Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int,
             return_success: bool = False) -> bool | None:
        """vLLM's interface: copy this rank's part of one tensor of expert ``expert_id`` into ``param``, if the expert is here.

        Raises:
            ValueError: the tensor's shape or dtype is not that of the format.
        """
        local = self.layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local == -1:
            return False if return_success else None
        loaded = loaded_weight[0] if loaded_weight.ndim == 4 else loaded_weight
        tensor = next(suffix for suffix in LAYER_TENSORS if weight_name.endswith(suffix))
        shape, dtype = layer_tensors(*self.shapes[shard_id])[tensor]
        if tuple(loaded.shape) != shape or loaded.dtype != dtype:
            raise ValueError(f"{self.prefix}.{expert_id}.{self.names[shard_id]}.{tensor}: expected shape {shape} {dtype} for "
                             f"{self.shapes[shard_id][2]} index bits, the checkpoint has {tuple(loaded.shape)} {loaded.dtype}")
        stem, position = _MATRICES[shard_id]
        cut = {"qweight": 1, "row_norms": 0}.get(tensor) if stem == "w13" else {"qweight": 2, "input_scales": 0}.get(tensor)
        if cut is not None:
            size = loaded.shape[cut] // self.layer.moe_config.moe_parallel_config.tp_size
            loaded = loaded.narrow(cut, self.layer.moe_config.tp_rank * size, size)
        target = param.data[local]
        if tensor == "input_scales":
            target = target[position]
        elif stem == "w13":
            dim = 1 if tensor == "qweight" else 0
            target = target.narrow(dim, position * loaded.shape[dim], loaded.shape[dim])
        target.copy_(loaded)
        self.arrived.add((local, shard_id, tensor))
        return True if return_success else None

    def verify(self) -> None:
        """Refuse experts that are incomplete or hold impossible values.

        Raises:
            ValueError: names the tensor, what was expected and what was found.
        """
        layer = self.layer
        numbers = {layer._map_global_expert_id_to_local_expert_id(e): e for e in range(layer.global_num_experts)}
        missing = [f"{self.prefix}.{numbers[local]}.{self.names[shard]}.{tensor}" for local in range(layer.local_num_experts)
                   for shard in _MATRICES for tensor in LAYER_TENSORS if (local, shard, tensor) not in self.arrived]
        if missing:
            raise ValueError(f"the checkpoint lacks {name_some(missing)}")
        self.arrived.clear()  # for a later reload
        for shard, (stem, position) in _MATRICES.items():
            norms, scales = getattr(layer, f"{stem}_row_norms").data, getattr(layer, f"{stem}_input_scales").data
            rows = norms.shape[1] // (2 if stem == "w13" else 1)
            own = norms[:, position * rows : (position + 1) * rows]
            for local, (of_expert, expert_norms) in enumerate(zip(scales[:, position], own, strict=True)):
                name = f"{self.prefix}.{numbers[local]}.{self.names[shard]}"
                try:
                    check_row_norms(expert_norms)
                    check_input_scales(of_expert)
                except ValueError as error:
                    raise ValueError(f"{name}.{error}") from None
                if not torch.equal(of_expert, scales[0, 0]):
                    raise ValueError(f"{name}.input_scales differs from that of other experts of the layer: they must share one vector")
