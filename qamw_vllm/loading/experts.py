"""What a checkpoint delivers for the experts of one layer.

What arrives decides whether they are quantized, and at which rates.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from qamw_kernels.errors import TensorError, first_few
from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.format.config import LAYER_TENSORS
from qamw_kernels.format.weight import check_input_scales, check_row_norms
from qamw_vllm.loading.experts_form import MATRICES, PLACES, ExpertsForm
from qamw_vllm.loading.linear import check_stored_tensor
from qamw_vllm.loading.load_formats import fill_with_dummy_values, loads_dummy_weights
from qamw_vllm.parallel import slice_of_rank

# The dimension of a tensor that ranks divide among them: w13 is cut by rows, w2 by inputs.
_DIVIDED = {
    "w13": {"qweight": 1, "row_norms": 0},
    "w2": {"qweight": 2, "input_scales": 0},
}
_NAMES_SHOWN = 8

LayerLoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Iterable[str]]


def lacking(names: Sequence[str]) -> TensorError:
    """The error for a checkpoint that has no tensors with these names."""
    return TensorError(f"the checkpoint lacks {first_few(names, _NAMES_SHOWN)}")


class ExpertsLoader:
    """Loaders for the tensors of the experts of one layer, on one rank.

    Args:
        layer: vLLM's RoutedExperts.
        prefix: the experts' name in the checkpoint.
        names: shard id -> the matrix's name in the checkpoint.
        shapes: shard id -> (N, K, index bits) in the checkpoint; the bits are those that
            config.json leads to expect.

    Attributes:
        form: the form of the experts; whoever makes the loader sets it before tensors arrive.
        check_possible: is called before quantized experts are loaded, and may refuse.
    """

    form: ExpertsForm

    def __init__(
        self,
        layer: Any,
        prefix: str,
        names: dict[str, str],
        shapes: dict[str, tuple[int, int, int]],
    ) -> None:
        self.layer, self.prefix, self.names, self.shapes = layer, prefix, names, dict(shapes)
        self.check_possible: Callable[[], object] = lambda: None
        self._quantized: bool | None = None  # until the first tensor arrives
        self._rated: set[str] = set()  # w13, w2: those of which planes have arrived
        self.dummy = loads_dummy_weights()
        self.arrived: set[tuple[int, str, str]] = set()  # expert on this rank, shard id, tensor
        self._is_reload = False

    def wrap(self, load_weights: LayerLoadWeights) -> LayerLoadWeights:
        """vLLM's loader of the whole layer, changed to accept the planes of one expert.

        vLLM takes a tensor of three dimensions for a stack of all experts, so planes get a fourth.
        """

        def load(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
            return load_weights(
                (name, tensor[None] if name.endswith(".qweight") else tensor)
                for name, tensor in weights
            )

        return load

    def load(
        self,
        param: Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy this rank's part of one tensor of an expert into ``param``, if the expert is here.

        The interface is vLLM's.

        Raises:
            TensorError: the tensor's shape or dtype is not that of the format.
        """
        local = self.layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local == -1:
            return False if return_success else None
        loaded = loaded_weight[0] if loaded_weight.ndim == 4 else loaded_weight
        suffixes = (suffix for suffix in LAYER_TENSORS if weight_name.endswith(suffix))
        tensor = next(suffixes, "weight")
        name = f"{self.prefix}.{expert_id}.{self.names[shard_id]}.{tensor}"
        stem, position = PLACES[shard_id]
        self._settle(name, loaded, shard_id)
        param = getattr(self.layer, f"{stem}_{tensor}")  # vLLM's model may hold a replaced one
        if tensor == "weight":
            self.arrived.add((local, shard_id, tensor))
            return self._load_plain(
                param, loaded_weight, weight_name, shard_id, expert_id, return_success
            )
        check_stored_tensor(name, loaded, *self.shapes[shard_id])
        divided = _DIVIDED[stem].get(tensor)
        if divided is not None:
            length = loaded.shape[divided] // self.layer.moe_config.moe_parallel_config.tp_size
            loaded = slice_of_rank(loaded, divided, length, self.layer.moe_config.tp_rank)
        target = param.data[local]
        if tensor == "input_scales":
            target = target[position]
        elif stem == "w13":  # gate and up are stacked by rows
            dim = 1 if tensor == "qweight" else 0
            target = target.narrow(dim, position * loaded.shape[dim], loaded.shape[dim])
        target.copy_(loaded)
        self.arrived.add((local, shard_id, tensor))
        return True if return_success else None

    def _load_plain(self, *arguments: Any) -> bool | None:
        loaded: bool | None = self.layer.weight_loader(*arguments)
        return loaded

    def _settle(self, name: str, loaded: torch.Tensor, shard_id: str) -> None:
        """Give the experts the form of what arrives, and refuse different forms in one layer."""
        quantized = not name.endswith(".weight")
        first = self._quantized is None
        if not first and quantized != self._quantized:
            raise TensorError(
                f"{self.prefix}: vLLM serves the experts of a layer together, so they must be "
                f"quantized alike, but the checkpoint has {name} beside experts that are "
                f"{'not ' if quantized else ''}quantized"
            )
        self._quantized = quantized
        if not quantized:
            if self.form.index_bits is not None:
                self.form.become_plain()
            return
        if first:
            self.check_possible()
        if name.endswith(".qweight"):
            self._settle_rate(name, loaded.shape[0], shard_id)

    def _settle_rate(self, name: str, found: int, shard_id: str) -> None:
        stem, _ = PLACES[shard_id]
        *_, expected = self.shapes[shard_id]
        known = stem in self._rated
        if found in INDEX_BITS:  # else the check of its shape refuses it
            self._rated.add(stem)
        if found == expected or found not in INDEX_BITS:
            return
        shards = MATRICES[stem]
        if known:
            matrices = " and ".join(self.names[shard] for shard in shards)
            raise TensorError(
                f"{name} has {found} index bits, but {matrices} that were loaded before have "
                f"{expected}: vLLM serves them together, so they must have one rate"
            )
        self.form.change_rate(stem, found)
        for shard in shards:
            rows, inputs, _ = self.shapes[shard]
            self.shapes[shard] = rows, inputs, found

    def check_loaded(self) -> None:
        """Refuse experts that are incomplete or hold impossible values; or fill in random weights.

        Afterwards the arrivals are forgotten, so that a later reload is checked too.

        Raises:
            TensorError: names the tensor, what was expected and what was found; or experts with
                biases are reloaded.
        """
        plain = self.form.index_bits is None
        if self._is_reload and not plain and hasattr(self.layer, "w13_bias"):
            # The model writes them into parameters that have no memory during a reload.
            raise TensorError(
                f"{self.prefix}: vLLM does not reload the biases of experts; start it again with "
                "the other checkpoint"
            )
        self._is_reload = True
        if self.dummy:
            for stem in () if plain else MATRICES:
                parameters = (getattr(self.layer, f"{stem}_{suffix}") for suffix in LAYER_TENSORS)
                fill_with_dummy_values(*(parameter.data for parameter in parameters))
            return
        numbers = {
            self.layer._map_global_expert_id_to_local_expert_id(expert): expert
            for expert in range(self.layer.global_num_experts)
        }
        missing = [
            f"{self.prefix}.{numbers[local]}.{self.names[shard]}.{tensor}"
            for local in range(self.layer.local_num_experts)
            for shard in PLACES
            for tensor in (("weight",) if plain else LAYER_TENSORS)
            if (local, shard, tensor) not in self.arrived
        ]
        if missing:
            raise lacking(missing)
        self.arrived.clear()
        if plain:
            return
        for shard in PLACES:
            self._check_values(shard, numbers)

    def _check_values(self, shard: str, numbers: dict[int, int]) -> None:
        """``numbers``: number of an expert on this rank -> its number in the checkpoint."""
        stem, position = PLACES[shard]
        input_scales = getattr(self.layer, f"{stem}_input_scales").data  # [experts, matrices, K]
        row_norms = getattr(self.layer, f"{stem}_row_norms").data  # [experts, rows of all matrices]
        num_rows = row_norms.shape[1] // input_scales.shape[1]
        row_norms = row_norms[:, position * num_rows : (position + 1) * num_rows]
        for local, norms in enumerate(row_norms):
            name = f"{self.prefix}.{numbers[local]}.{self.names[shard]}"
            scales = input_scales[local, position]
            check_row_norms(norms, f"{name}.row_norms")
            check_input_scales(scales, f"{name}.input_scales")
            if not torch.equal(scales, input_scales[0, 0]):
                raise TensorError(
                    f"{name}.input_scales differs from that of other experts of the layer: "
                    "they must share one vector"
                )
