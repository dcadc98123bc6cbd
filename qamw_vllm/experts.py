"""Quantised mixtures of experts: all experts of a layer at once, tensor parallel or expert parallel, on CUDA and on the CPU."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from qamw_kernels import ops
from qamw_kernels.codec import QuantizedWeight, check_input_scales, check_row_norms
from qamw_kernels.format import LAYER_TENSORS, QamwFormat, layer_tensors
from qamw_kernels.routing import Routing, sort_slots
from qamw_kernels.tiling import tile_planes
from qamw_vllm.config import LoadSummary
from qamw_vllm.linear import backend_says, check_split, choose_backend, decode_rows, warm_up_once

logger = init_logger(f"vllm.{__name__}")

MATRICES = {"w1": ("w13", 0), "w3": ("w13", 1), "w2": ("w2", 0)}  # vLLM's shard ids -> parameter, and position of the matrix in it


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
        stored: list[torch.Tensor] = []
        num_weights = 0
        for stem in ("w13", "w2"):
            qweight, row_norms, input_scales = (getattr(layer, f"{stem}_{suffix}").data for suffix in LAYER_TENSORS)
            scales = input_scales[0, 0].clone()
            stored += [qweight, row_norms, input_scales]
            num_weights += row_norms.numel() * len(scales)
            weights = [QuantizedWeight(*of_expert, scales, self.rotation_block_sizes[stem])
                       for of_expert in zip(qweight, row_norms, strict=True)]
            for suffix in LAYER_TENSORS:
                delattr(layer, f"{stem}_{suffix}")
            if self.backend == "decode":
                decoded = torch.stack([decode_rows(weight, self.params_dtype) for weight in weights])
                layer.register_parameter(f"{stem}_weight", Parameter(decoded, requires_grad=False))
                continue
            tiles = torch.stack([tile_planes(weight.qweight) for weight in weights])
            words = ops.quadrant_words(self.index_bits[stem], qweight.device)
            for suffix, tensor in (("qweight", tiles), ("row_norms", row_norms), ("input_scales", scales)):
                layer.register_parameter(f"{stem}_{suffix}", Parameter(tensor, requires_grad=False))
            layer.register_buffer(f"{stem}_quadrant_words", words, persistent=False)
        if self.backend == "decode":
            self._plain.moe_kernel = None  # else, after a reload, it would go on with the weights that it packed before
            self._plain.process_weights_after_loading(layer)
            self.moe_kernel, self.moe_quant_config = self._plain.moe_kernel, self._plain.moe_quant_config
        elif current_platform.is_cuda():
            warm_up_once(self.format, self.params_dtype, layer.w2_row_norms.device, experts=True)
        if self.summary.add(stored, num_weights):
            logger.info("QAM-W: %s. %s", self.summary, backend_says(self.backend, self.params_dtype))

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


def _route(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None, dtype: torch.dtype) -> Routing:
    """The slots in blocks; on CUDA by vLLM's kernel, of which :func:`sort_slots` is the slow truth."""
    from qamw_kernels import triton_launch

    block_size = triton_launch.routed_block_size(topk_ids.numel(), num_experts, dtype)
    if not topk_ids.is_cuda:
        return sort_slots(topk_ids, block_size, num_experts, expert_map)
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    return Routing(*moe_align_block_size(topk_ids, block_size, num_experts, expert_map), block_size)


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
        stem, position = MATRICES[shard_id]
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
                   for shard in MATRICES for tensor in LAYER_TENSORS if (local, shard, tensor) not in self.arrived]
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise ValueError(f"the checkpoint lacks {', '.join(missing[:8])}{more}")
        self.arrived.clear()  # for a later reload
        for shard, (stem, position) in MATRICES.items():
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
