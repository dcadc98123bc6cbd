"""Quantized mixtures of experts: all experts of a layer, tensor parallel or expert parallel."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.errors import FormatError
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat, layer_tensors
from qamw_kernels.format.rates import QuantizedShape
from qamw_kernels.format.sharding import check_input_split
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.linear import routed_linear
from qamw_kernels.ops.routing import Routing, sort_slots
from qamw_kernels.ops.weight import TiledWeight
from qamw_vllm.backend import (
    Backend,
    BackendError,
    choose_backend,
    describe_backend,
    warm_up_once,
)
from qamw_vllm.loading.experts import ExpertsLoader
from qamw_vllm.state import (
    LayerState,
    LoadSummary,
    mark_ready,
    register_tiled_weight,
    state_of,
    tiled_weight_of,
)

logger = init_logger(f"vllm.{__name__}")

STEMS = ("w13", "w2")
"""vLLM's names of gate and up, stacked, and of down."""

_MATRICES = {"w13": 2, "w2": 1}  # stacked in each


class QamwMoEMethod(FusedMoEMethodBase):
    """The experts of one layer.

    With the ``triton`` backend they stay packed, and one kernel multiplies every token with the
    experts that it is sent to; with ``decode`` they become plain experts while loading, and vLLM's
    own CPU kernel runs.

    Args:
        layer: vLLM's RoutedExperts.
        prefix: the experts' name in the checkpoint: ``<prefix>.<number>.<matrix>.qweight``.
        format: the checkpoint's format.
        summary: of all layers of the model in this process.
        backend: None for that of this machine, see :func:`choose_backend`.

    Raises:
        FormatError: the layer computes something that is not built here, or the rates of matrices
            that vLLM fuses differ.
        BackendError: vLLM is too old.
    """

    def __init__(
        self,
        layer: Any,
        prefix: str,
        format: QamwFormat,
        summary: LoadSummary,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.format, self.summary = prefix, format, summary
        check_supported(layer, prefix)
        self.names = names_of_matrices(layer, prefix)
        self.index_bits = self._index_bits()
        self.backend = backend or choose_backend()
        if self.backend == "decode":
            self._plain = UnquantizedFusedMoEMethod(layer.moe_config)
            self.experts_cls = self._plain.experts_cls  # tells vLLM what the kernel will want

    def _index_bits(self) -> dict[str, int]:
        """Index bits of w13 and of w2."""
        bits = {
            shard: self.format.index_bits_of(f"{self.prefix}.0.{name}")
            for shard, name in self.names.items()
        }
        if bits["w1"] != bits["w3"]:
            raise FormatError(
                f"{self.prefix}: vLLM fuses {self.names['w1']} and {self.names['w3']}, so they "
                "must have the same index bits, but the checkpoint has "
                f"{bits['w1']} and {bits['w3']}"
            )
        return {"w13": bits["w1"], "w2": bits["w2"]}

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the packed tensors of the experts and shards of this rank, as on disk.

        Raises:
            TensorError: the inner activation cannot be split over this many ranks.
            FormatError: config.json has no rotation block size for this number of inputs.
        """
        self.params_dtype = params_dtype
        local = intermediate_size_per_partition
        inner = local * self.moe.moe_parallel_config.tp_size
        self.rotation_block_sizes = {
            "w13": self._rotation_block_size("w1", hidden_size),
            "w2": self._rotation_block_size("w2", inner),
        }
        self.check_split(inner, local)
        shapes = {
            "w1": (inner, hidden_size, self.index_bits["w13"]),
            "w3": (inner, hidden_size, self.index_bits["w13"]),
            "w2": (hidden_size, inner, self.index_bits["w2"]),
        }
        self._loader = ExpertsLoader(layer, self.prefix, self.names, shapes)
        for stem, rows, inputs in (("w13", 2 * local, hidden_size), ("w2", hidden_size, local)):
            tensors = layer_tensors(rows, inputs, self.index_bits[stem])
            for suffix, (shape, dtype) in tensors.items():
                if suffix == "input_scales":  # every matrix brings its own copy
                    shape = (_MATRICES[stem], *shape)
                empty = torch.empty((num_experts, *shape), dtype=dtype)
                parameter = Parameter(empty, requires_grad=False)
                loader = self._loader.load
                parameter.weight_loader = loader  # type: ignore[attr-defined]  # vLLM looks for it
                layer.register_parameter(f"{stem}_{suffix}", parameter)
        layer.load_weights = self._loader.wrap(layer.load_weights)
        self.summary.expect_layer()
        logger.debug(
            "%s: %s index bits, rotation blocks of %s, %d experts of %d x %d on this rank",
            self.prefix,
            self.index_bits,
            self.rotation_block_sizes,
            num_experts,
            local,
            hidden_size,
        )

    def _rotation_block_size(self, shard: str, num_inputs: int) -> int:
        module = f"{self.prefix}.0.{self.names[shard]}"
        return self.format.rotation_block_size_of(module, num_inputs)

    def check_split(self, num_inputs: int, num_inputs_of_rank: int) -> None:
        """Refuse inputs of w2 that cannot be split over the ranks.

        Raises:
            TensorError: names the numbers of ranks that are possible.
        """
        name, block = f"{self.prefix}.*.{self.names['w2']}", self.rotation_block_sizes["w2"]
        check_input_split(name, num_inputs, num_inputs_of_rank, block)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # of vLLM's own kernels

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what arrived and bring it into the form that ``apply`` uses.

        Does nothing when called again, until vLLM has reloaded the layer.

        Raises:
            TensorError: a tensor is missing or holds impossible values.
        """
        if state_of(layer) is LayerState.READY:
            return
        self._loader.check_loaded()
        experts = {}
        for stem in STEMS:
            qweight, row_norms, input_scales = (
                getattr(layer, f"{stem}_{suffix}").data for suffix in LAYER_TENSORS
            )
            for suffix in LAYER_TENSORS:
                delattr(layer, f"{stem}_{suffix}")
            shared_scales = input_scales[0, 0].clone()
            experts[stem] = [
                QuantizedWeight(planes, norms, shared_scales, self.rotation_block_sizes[stem])
                for planes, norms in zip(qweight, row_norms, strict=True)
            ]
        self.use(layer, experts)

    def use(self, layer: Any, experts: dict[str, list[QuantizedWeight]]) -> None:
        """Give the layer the experts of this rank, w13 and w2, as ``apply`` uses them.

        Raises:
            TensorError: a value cannot be, or the layer's dtype does not hold what it decodes to.
        """
        shapes: list[QuantizedShape] = []
        for stem, weights in experts.items():
            matrices = _MATRICES[stem]
            for weight in weights:
                num_rows, num_inputs = weight.shape
                shape = QuantizedShape(num_rows // matrices, num_inputs, weight.index_bits)
                shapes += [shape] * matrices
            where = f"{self.prefix} on this rank"
            names = [f"{where}: {stem} of expert {number}" for number in range(len(weights))]
            if self.backend == "decode":
                dtype = self.params_dtype
                decoded = torch.stack(
                    [decode_checked(w, name, dtype) for w, name in zip(weights, names, strict=True)]
                )
                layer.register_parameter(f"{stem}_weight", Parameter(decoded, requires_grad=False))
            else:
                for weight, name in zip(weights, names, strict=True):
                    weight.check(name)
                register_tiled_weight(layer, TiledWeight.of_experts(weights), f"{stem}_")
        if self.backend == "decode":
            # A reload would go on with the weights that the kernel packed before.
            self._plain.moe_kernel = None
            self._plain.process_weights_after_loading(layer)
            self.moe_kernel = self._plain.moe_kernel
            self.moe_quant_config = self._plain.moe_quant_config
        else:
            warm_up_once(self.format, self.params_dtype, layer.w2_tiles.device, experts=True)
        mark_ready(layer)
        if self.summary.add_layer(shapes):
            logger.info("QAM-W: %s. %s", self.summary, self.describe())

    def describe(self) -> str:
        """What runs, and why."""
        return describe_backend(self.backend, self.params_dtype)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of every token, the sum over its experts; with parallelism, this rank's part of it.

        Args:
            x: [M, hidden]. topk_weights: [M, k]. topk_ids: [M, k].
        Returns:
            [M, hidden] in the dtype of x.
        """
        if self.backend == "decode":
            return self._plain.apply(
                layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input
            )
        num_slots = topk_ids.numel()
        routing = _route(topk_ids, layer.global_num_experts, layer.expert_map, x.dtype)
        both = self._multiply("w13", layer, x, routing, num_slots)
        inner = torch.empty(num_slots, both.shape[1] // 2, dtype=x.dtype, device=x.device)
        apply_moe_activation(layer.activation, inner, both)
        y = self._multiply("w2", layer, inner, routing, num_slots)
        y = y.view(*topk_ids.shape, x.shape[1])
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for k in range(topk_ids.shape[1]):  # one by one, for y in float32 would be large
            out += y[:, k] * topk_weights[:, k, None]
        return out.to(x.dtype)

    def _multiply(
        self,
        stem: str,
        layer: Any,
        x: torch.Tensor,
        routing: Routing,
        num_slots: int,
    ) -> torch.Tensor:
        weight = tiled_weight_of(layer, self.rotation_block_sizes[stem], f"{stem}_")
        return routed_linear(x, weight, routing, num_slots)


def check_supported(layer: Any, prefix: str) -> None:
    """Refuse experts that compute something that is not built here.

    Raises:
        FormatError: names what it is.
    """
    unknown = {
        "biases": layer.moe_config.has_bias,
        "no gate": not layer.moe_config.is_act_and_mul,
        "a limited activation": layer.swiglu_limit,
        "router weights on their input": layer.apply_router_weight_on_input,
    }
    if any(unknown.values()):
        found = ", ".join(name for name, present in unknown.items() if present)
        raise FormatError(f"{prefix}: qamw does not know experts with {found}")


def names_of_matrices(layer: Any, prefix: str) -> dict[str, str]:
    """vLLM's shard id -> the matrix's name in the checkpoint.

    Raises:
        BackendError: vLLM is too old to tell.
    """
    if not hasattr(layer, "ckpt_gate_proj_name"):
        raise BackendError(
            f"{prefix}: experts need vLLM 0.25 or newer, which tells what their matrices are called"
        )
    return {
        "w1": layer.ckpt_gate_proj_name,
        "w3": layer.ckpt_up_proj_name,
        "w2": layer.ckpt_down_proj_name,
    }


def _route(
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None,
    dtype: torch.dtype,
) -> Routing:
    """The slots in blocks; on CUDA by vLLM's kernel, whose reference is :func:`sort_slots`."""
    from qamw_kernels.ops.triton.launch import routed_block_size

    block_size = routed_block_size(topk_ids.numel(), num_experts, dtype)
    if not topk_ids.is_cuda:
        return sort_slots(topk_ids, block_size, num_experts, expert_map)
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    aligned = moe_align_block_size(topk_ids, block_size, num_experts, expert_map)
    return Routing(*aligned, block_size)
