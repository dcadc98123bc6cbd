"""Mixtures of experts of a plain checkpoint, quantized while loading."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from qamw_kernels.errors import TensorError
from qamw_kernels.format.config import QamwFormat
from qamw_kernels.format.weight import QuantizedWeight
from qamw_vllm.backend import Backend, BackendError
from qamw_vllm.experts import QamwMoEMethod
from qamw_vllm.loading.experts import lacking
from qamw_vllm.loading.experts_form import MATRICES, ExpertsShape
from qamw_vllm.loading.linear import check_source
from qamw_vllm.loading.load_formats import loads_dummy_weights
from qamw_vllm.online.encode import encode_shard
from qamw_vllm.online.plan import OnlinePlan
from qamw_vllm.parallel import num_ranks, tensor_parallel_sizes_of_model
from qamw_vllm.state import LayerState, LoadSummary, state_of


class QamwOnlineMoEMethod(QamwMoEMethod):
    """The experts of one layer, quantized as soon as all have arrived: one layer's at a time.

    The weights are bit for bit those of ``qamw quantize --calibration none``, of a checkpoint in
    the layer's dtype.

    Experts with biases wait in the CPU's memory until the whole model has arrived: vLLM's model
    (gpt-oss) writes most of their tensors into the parameters itself, where no loader sees them.

    Args:
        plan: of the whole model; the others are those of :class:`QamwMoEMethod`.
    """

    uses_meta_device = True

    def __init__(
        self,
        layer: Any,
        prefix: str,
        plan: OnlinePlan,
        summary: LoadSummary,
        backend: Backend | None = None,
    ) -> None:
        unknown_yet = QamwFormat(plan.index_bits, {}, code=plan.code)  # until all layers are made
        super().__init__(layer, prefix, unknown_yet, summary, backend)
        self.plan = plan
        self.uses_meta_device = not self.moe.has_bias
        self._tp_sizes = tensor_parallel_sizes_of_model()
        self._dummy = loads_dummy_weights()
        self._arrived: set[tuple[int, str]] = set()  # expert, shard id

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the plain weights; without biases they take no memory before they are loaded.

        Raises:
            BackendError: ranks that are not of one tensor-parallel group hold parts of the same
                rows.
        """
        tp_size = self.moe.moe_parallel_config.tp_size
        if tp_size not in (1, num_ranks()):
            raise BackendError(
                f"{self.prefix}: data parallelism divides experts among more ranks than tensor "
                "parallelism does: run qamw quantize first, or serve with --enable-expert-parallel"
            )
        self.params_dtype = params_dtype
        local = intermediate_size_per_partition
        self._num_inputs = {"w13": hidden_size, "w2": local * tp_size}
        self.plan.add_layer(self._num_inputs["w13"], row_parallel=False)
        self.plan.add_layer(self._num_inputs["w2"], row_parallel=True)
        self.summary.expect_layer()
        load, num_experts_of_layer = extra_weight_attrs["weight_loader"], layer.global_num_experts
        loader = self._record_arrivals(load, num_experts_of_layer)
        shape = ExpertsShape(num_experts, hidden_size, local)
        device = "meta" if self.uses_meta_device else "cpu"
        for stem in MATRICES:
            size = num_experts, *shape.of(stem)
            nothing = torch.full(size, torch.nan, dtype=params_dtype, device=device)
            parameter = Parameter(nothing, requires_grad=False)
            set_weight_attrs(parameter, {**extra_weight_attrs, "weight_loader": loader})
            layer.register_parameter(f"{stem}_weight", parameter)
        if self.moe.has_bias:
            sizes = num_experts, hidden_size, local
            self._register_biases(layer, *sizes, **extra_weight_attrs)
        else:
            initialize_online_processing(layer)

    def _record_arrivals(
        self, load: Callable[..., bool | None], num_experts: int
    ) -> Callable[..., bool | None]:
        """vLLM's loader of one tensor of one or all experts, which also records what arrived.

        Raises (from the loader):
            TensorError: see :func:`check_source`.
        """

        def loader(
            param: Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            name = f"{self.prefix}.{expert_id}.{self.names[shard_id]}.weight"
            check_source(name, loaded_weight, param.dtype)
            all_experts = loaded_weight.ndim == 3  # a stack of all experts of this rank
            experts = range(num_experts) if all_experts else (expert_id,)
            self._arrived.update((expert, shard_id) for expert in experts)
            return load(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

        return loader

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize the experts of this rank.

        Does nothing when called again, until vLLM has reloaded the layer.

        Raises:
            TensorError: the checkpoint lacks one, a value is not finite, or the inputs cannot be
                split over this many ranks.
        """
        if state_of(layer) is LayerState.READY:
            return
        if not self._dummy:
            self._check_arrived(layer)
        self._arrived.clear()
        self.format = self.plan.format(self._tp_sizes)
        self.rotation_block_sizes = {
            stem: self.format.rotation_block_size_of(self.prefix, num_inputs)
            for stem, num_inputs in self._num_inputs.items()
        }
        self.use(layer, {stem: self._quantize(layer, stem) for stem in MATRICES})

    def _check_arrived(self, layer: Any) -> None:
        if self.moe.has_bias:
            for stem in MATRICES:
                for number, weight in enumerate(getattr(layer, f"{stem}_weight")):
                    if weight.isnan().all():  # as create_weights has filled it
                        where = f"{self.prefix}: {stem} of this rank's expert {number}"
                        raise TensorError(f"the checkpoint lacks {where}")
            return
        missing = [
            f"{self.prefix}.{expert}.{name}.weight"
            for expert in range(layer.global_num_experts)
            if layer._map_global_expert_id_to_local_expert_id(expert) != -1
            for shard, name in self.names.items()
            if (expert, shard) not in self._arrived
        ]
        if missing:
            raise lacking(missing)

    def _quantize(self, layer: Any, stem: str) -> list[QuantizedWeight]:
        weights = getattr(layer, f"{stem}_weight").data  # [experts, N, K], of this rank
        delattr(layer, f"{stem}_weight")
        num_inputs, block = self._num_inputs[stem], self.rotation_block_sizes[stem]
        if stem == "w2":
            self.check_split(num_inputs, weights.shape[2])
        return [
            encode_shard(
                weight,
                f"{self.prefix}: {stem} of this rank's expert {number}",
                self.plan,
                num_inputs,
                block,
                self.moe.tp_rank,
            )
            for number, weight in enumerate(weights)
        ]

    def describe(self) -> str:
        return f"Quantized while loading. {super().describe()}"
