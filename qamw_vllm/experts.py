"""Quantised mixtures of experts: all experts of a layer at once, tensor parallel or expert parallel, on CUDA and on the CPU."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from qamw_kernels.ops import linear as ops
from qamw_kernels.codec.encode import InputShard, QuantizedWeight, encode_weight, make_input_scales
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat, layer_tensors
from qamw_kernels.ops.routing import Routing, sort_slots
from qamw_kernels.format.sharding import choose_rotation_block_sizes
from qamw_kernels.ops.tiling import tile_planes
from qamw_vllm.config import LoadSummary, WhileLoading
from qamw_vllm.linear import (
    add_up_over_ranks,
    backend_says,
    check_split,
    choose_backend,
    decode_rows,
    tp_sizes_of_model,
    warm_up_once,
)
from qamw_vllm.loading.linear import ExpertsLoader, name_some

logger = init_logger(f"vllm.{__name__}")

STEMS = ("w13", "w2")  # vLLM's names of gate and up, stacked, and of down


class QamwMoEMethod(FusedMoEMethodBase):
    """The experts of one layer.

    With the ``triton`` backend they stay packed, and one kernel multiplies every token with the experts that it is sent to; with ``decode``
    they become plain experts while loading, and vLLM's own CPU kernel runs.

    Args:
        layer: vLLM's RoutedExperts.
        prefix: the experts' name in the checkpoint: ``<prefix>.<number>.<matrix>.qweight``.
        format: the checkpoint's format. summary: of all layers of the model in this process.

    Raises:
        ValueError: the layer computes something that is not built here.
    """

    def __init__(self, layer: Any, prefix: str, format: QamwFormat, summary: LoadSummary) -> None:
        moe = layer.moe_config
        super().__init__(moe)
        self.prefix, self.format, self.summary = prefix, format, summary
        unknown = {"biases": moe.has_bias, "no gate": not moe.is_act_and_mul, "a limited activation": layer.swiglu_limit,
                   "router weights on their input": layer.apply_router_weight_on_input}
        if any(unknown.values()):
            raise ValueError(f"{prefix}: qamw does not know experts with {', '.join(what for what, found in unknown.items() if found)}")
        if not hasattr(layer, "ckpt_gate_proj_name"):
            raise ValueError(f"{prefix}: experts need vLLM 0.25 or newer, which says what their matrices are called")
        self.names = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        bits = {shard: format.index_bits_of(f"{prefix}.0.{name}") for shard, name in self.names.items()}
        if bits["w1"] != bits["w3"]:
            raise ValueError(f"{prefix}: vLLM fuses {self.names['w1']} and {self.names['w3']}, so they must have the same index bits, "
                             f"but the checkpoint has {bits['w1']} and {bits['w3']}")
        self.index_bits = {"w13": bits["w1"], "w2": bits["w2"]}
        self.backend = choose_backend()
        if self.backend == "decode":
            self._plain = UnquantizedFusedMoEMethod(moe)
            self.experts_cls = self._plain.experts_cls  # by which vLLM knows what the kernel will want

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the packed tensors of the experts and shards of this rank, as the checkpoint holds them.

        Raises:
            ValueError: the inner activation cannot be split over this many ranks.
        """
        self.params_dtype = params_dtype
        inner = intermediate_size_per_partition * self.moe.moe_parallel_config.tp_size
        self.rotation_block_sizes = {
            "w13": self.format.rotation_block_size_of(f"{self.prefix}.0.{self.names['w1']}", hidden_size),
            "w2": self.format.rotation_block_size_of(f"{self.prefix}.0.{self.names['w2']}", inner)}
        check_split(f"{self.prefix}.*.{self.names['w2']}", inner, intermediate_size_per_partition, self.rotation_block_sizes["w2"])
        self._loader = ExpertsLoader(layer, self.prefix, self.names, {
            "w1": (inner, hidden_size, self.index_bits["w13"]), "w3": (inner, hidden_size, self.index_bits["w13"]),
            "w2": (hidden_size, inner, self.index_bits["w2"])})
        local = intermediate_size_per_partition
        for stem, (rows, inputs, matrices) in {"w13": (2 * local, hidden_size, 2), "w2": (hidden_size, local, 1)}.items():
            for suffix, (shape, dtype) in layer_tensors(rows, inputs, self.index_bits[stem]).items():
                shape = (num_experts, matrices, *shape) if suffix == "input_scales" else (num_experts, *shape)
                parameter = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
                parameter.weight_loader = self._loader.load  # type: ignore[attr-defined]
                layer.register_parameter(f"{stem}_{suffix}", parameter)
        layer.load_weights = self._loader.wrap(layer.load_weights)
        self.summary.expect()
        logger.debug("%s: %s index bits, rotation blocks of %s, %d experts of %d x %d on this rank", self.prefix, self.index_bits,
                     self.rotation_block_sizes, num_experts, local, hidden_size)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # of vLLM's own kernels

    def process_weights_after_loading(self, layer: Any) -> None:
        """Verify what arrived and bring it into the form that ``apply`` uses. Does nothing when called again.

        Raises:
            ValueError: a tensor is missing or holds impossible values.
        """
        if getattr(layer, "w13_input_scales", None) is None or layer.w13_input_scales.ndim == 1:
            return
        self._loader.verify()
        experts = {}
        for stem in STEMS:
            qweight, row_norms, input_scales = (getattr(layer, f"{stem}_{suffix}").data for suffix in LAYER_TENSORS)
            for suffix in LAYER_TENSORS:
                delattr(layer, f"{stem}_{suffix}")
            experts[stem] = [QuantizedWeight(*of_expert, input_scales[0, 0].clone(), self.rotation_block_sizes[stem])
                             for of_expert in zip(qweight, row_norms, strict=True)]
        self._use(layer, experts)

    def _use(self, layer: Any, experts: dict[str, list[QuantizedWeight]]) -> None:
        """Give the layer the experts of this rank, w13 and w2, in the form that ``apply`` uses."""
        stored: list[torch.Tensor] = []
        num_weights = 0
        for stem, weights in experts.items():
            for weight in weights:
                num_rows, num_inputs = weight.shape
                stored += [weight.qweight, weight.row_norms, *[weight.input_scales] * (2 if stem == "w13" else 1)]
                num_weights += num_rows * num_inputs
            if self.backend == "decode":
                decoded = torch.stack([decode_rows(weight, self.params_dtype) for weight in weights])
                layer.register_parameter(f"{stem}_weight", Parameter(decoded, requires_grad=False))
                continue
            tiles = torch.stack([tile_planes(weight.qweight) for weight in weights])
            row_norms = torch.stack([weight.row_norms for weight in weights])
            words = ops.quadrant_words(self.index_bits[stem], tiles.device)
            for suffix, tensor in (("qweight", tiles), ("row_norms", row_norms), ("input_scales", weights[0].input_scales)):
                layer.register_parameter(f"{stem}_{suffix}", Parameter(tensor, requires_grad=False))
            layer.register_buffer(f"{stem}_quadrant_words", words, persistent=False)
        if self.backend == "decode":
            self._plain.moe_kernel = None  # else, after a reload, it would go on with the weights that it packed before
            self._plain.process_weights_after_loading(layer)
            self.moe_kernel, self.moe_quant_config = self._plain.moe_kernel, self._plain.moe_quant_config
        elif current_platform.is_cuda():
            warm_up_once(self.format, self.params_dtype, layer.w2_row_norms.device, experts=True)
        if self.summary.add(stored, num_weights):
            logger.info("QAM-W: %s. %s", self.summary, self._says())

    def _says(self) -> str:
        """What runs, and why."""
        return backend_says(self.backend, self.params_dtype)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, hidden] to [T, hidden]: of every token, the sum over its experts ``topk_ids`` [T, k], times ``topk_weights`` [T, k].

        With tensor or expert parallelism, this rank's part of it.
        """
        if self.backend == "decode":
            return self._plain.apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        num_slots = topk_ids.numel()
        routing = _route(topk_ids, layer.global_num_experts, layer.expert_map, x.dtype)
        both = self._multiply("w13", layer, x, routing, num_slots)
        inner = torch.empty(num_slots, both.shape[1] // 2, dtype=x.dtype, device=x.device)
        apply_moe_activation(layer.activation, inner, both)
        y = self._multiply("w2", layer, inner, routing, num_slots).view(*topk_ids.shape, x.shape[1])
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for k in range(topk_ids.shape[1]):  # one by one, for y in float32 would be large
            out += y[:, k] * topk_weights[:, k, None]
        return out.to(x.dtype)

    def _multiply(self, stem: str, layer: Any, x: torch.Tensor, routing: Routing, num_slots: int) -> torch.Tensor:
        qweight, row_norms, input_scales, words = (getattr(layer, f"{stem}_{suffix}") for suffix in (*LAYER_TENSORS, "quadrant_words"))
        return ops.routed_linear(x, qweight, row_norms, input_scales, words, routing, num_slots, self.rotation_block_sizes[stem])


class QamwLoadingMoEMethod(QamwMoEMethod):
    """The experts of one layer of a plain checkpoint, quantised as soon as all have arrived: one layer's are in memory at a time.

    The weights are bit for bit those of ``qamw quantize --calibration none``.

    Args:
        plan: of the whole model; the others are those of :class:`QamwMoEMethod`.
    """

    uses_meta_device = True

    def __init__(self, layer: Any, prefix: str, plan: WhileLoading, summary: LoadSummary) -> None:
        super().__init__(layer, prefix, QamwFormat(plan.index_bits, {}), summary)
        self.plan = plan
        self._tp_sizes = tp_sizes_of_model()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the plain weights, which take no memory before they are loaded.

        Raises:
            ValueError: ranks that are not of one tensor-parallel group hold parts of the same rows.
        """
        if self.moe.moe_parallel_config.tp_size not in (1, get_tp_group().world_size):
            raise ValueError(f"{self.prefix}: data parallelism cuts experts over more ranks than tensor parallelism does: "
                             "run qamw quantize first, or serve with --enable-expert-parallel")
        self.params_dtype = params_dtype
        local = intermediate_size_per_partition
        self._num_inputs = {"w13": hidden_size, "w2": local * self.moe.moe_parallel_config.tp_size}
        self.plan.layers |= {(self._num_inputs["w13"], False), (self._num_inputs["w2"], True)}
        self.summary.expect()
        self._arrived: set[tuple[int, str]] = set()  # expert, shard id
        load = extra_weight_attrs["weight_loader"]

        def noted(param: Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int,
                  return_success: bool = False) -> bool | None:
            self._arrived.add((expert_id, shard_id))
            return load(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

        for stem, shape in (("w13", (2 * local, hidden_size)), ("w2", (hidden_size, local))):
            parameter = Parameter(torch.empty(num_experts, *shape, dtype=params_dtype, device="meta"), requires_grad=False)
            set_weight_attrs(parameter, {**extra_weight_attrs, "weight_loader": noted})
            layer.register_parameter(f"{stem}_weight", parameter)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantise the experts of this rank. Does nothing when called again.

        Raises:
            ValueError: the checkpoint lacks one, a value is not finite, or the inputs cannot be split over this many ranks.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        layer._already_called_process_weights_after_loading = True
        missing = [f"{self.prefix}.{expert}.{name}.weight" for expert in range(layer.global_num_experts)
                   for shard, name in self.names.items() if (expert, shard) not in self._arrived]
        if missing:
            raise ValueError(f"the checkpoint lacks {name_some(missing)}")
        self._arrived.clear()
        sizes = choose_rotation_block_sizes(self.plan.layers, self._tp_sizes)
        self.format = QamwFormat(self.plan.index_bits, sizes)
        self.rotation_block_sizes = {stem: sizes[num_inputs] for stem, num_inputs in self._num_inputs.items()}
        self._use(layer, {stem: self._quantize(layer, stem) for stem in STEMS})

    def _quantize(self, layer: Any, stem: str) -> list[QuantizedWeight]:
        weights = getattr(layer, f"{stem}_weight").data
        delattr(layer, f"{stem}_weight")
        num_inputs, own, block = self._num_inputs[stem], weights.shape[2], self.rotation_block_sizes[stem]
        check_split(f"{self.prefix}.*.{self.names['w2']}", num_inputs, own, block)
        input_scales, shard = make_input_scales(num_inputs), None
        if own != num_inputs:
            input_scales = input_scales[self.moe.tp_rank * own :][:own].clone()
            shard = InputShard(num_inputs, add_up_over_ranks)
        return [encode_weight(weight, self.index_bits[stem], block, input_scales, f"{self.prefix}: {stem} of this rank's expert {i}",
                              shard=shard) for i, weight in enumerate(weights)]

    def _says(self) -> str:
        return f"Quantised while loading. {super()._says()}"


def _route(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None, dtype: torch.dtype) -> Routing:
    """The slots in blocks; on CUDA by vLLM's kernel, of which :func:`sort_slots` is the slow truth."""
    from qamw_kernels.ops.triton import launch as triton_launch

    block_size = triton_launch.routed_block_size(topk_ids.numel(), num_experts, dtype)
    if not topk_ids.is_cuda:
        return sort_slots(topk_ids, block_size, num_experts, expert_map)
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    return Routing(*moe_align_block_size(topk_ids, block_size, num_experts, expert_map), block_size)
