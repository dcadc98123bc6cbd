"""Quantized mixtures of experts: all experts of a layer, tensor parallel or expert parallel."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import activation as vllm_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.errors import FormatError, TensorError
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat
from qamw_kernels.format.rates import QuantizedShape
from qamw_kernels.format.sharding import check_input_split
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.linear import combine, routed_linear
from qamw_kernels.ops.routing import Routing, sort_slots
from qamw_kernels.ops.weight import TiledWeight
from qamw_vllm.backend import (
    Backend,
    BackendError,
    check_adapters,
    choose_backend,
    describe_backend,
    warm_up_once,
)
from qamw_vllm.loading.experts import ExpertsLoader
from qamw_vllm.loading.experts_form import MATRICES, ExpertsForm, ExpertsShape
from qamw_vllm.parallel import check_exchange
from qamw_vllm.state import (
    LayerState,
    LoadSummary,
    mark_ready,
    register_tiled_weight,
    state_of,
    tiled_weight_of,
)

logger = init_logger(f"vllm.{__name__}")
EXPERT_BIASES = ("w13_bias", "w2_bias")  # vLLM's names


class QamwMoEMethod(FusedMoEMethodBase):
    """The experts of one layer of a quantized checkpoint.

    They are quantized if quantized tensors arrive for them; if plain weights do, they become plain
    experts of vLLM.

    With the ``triton`` backend quantized experts stay packed, and one kernel multiplies every token
    with the experts that it is sent to; with ``decode`` they become plain experts while loading,
    and vLLM's own CPU kernel runs.

    Args:
        layer: vLLM's RoutedExperts.
        prefix: the experts' name in the checkpoint: ``<prefix>.<number>.<matrix>.qweight``.
        format: the checkpoint's format.
        summary: of all layers of the model in this process.
        backend: None for that of this machine, see :func:`choose_backend`.

    Raises:
        FormatError: see :func:`check_supported`.
        BackendError: vLLM is too old, would put adapters on packed experts, or cannot send tokens
            to them.
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
        if self.backend == "triton":
            check_adapters(prefix)
            check_exchange(layer.moe_config.moe_parallel_config, prefix)
        else:
            self._plain = UnquantizedFusedMoEMethod(layer.moe_config)
            self.experts_cls = self._plain.experts_cls  # vLLM asks it before the kernel is made

    def _index_bits(self) -> dict[str, int]:
        """Index bits that config.json gives for w13 and for w2."""
        return {
            stem: self.format.index_bits_of(f"{self.prefix}.0.{self.names[shards[0]]}")
            for stem, shards in MATRICES.items()
        }

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the tensors of the experts and shards of this rank, as on disk.

        Experts that cannot be quantized are expected to be plain, as in
        :meth:`qamw_vllm.linear.QamwLinearMethod.create_weights`.

        Raises:
            TensorError, FormatError: random weights are to be loaded, and cannot be quantized.
        """
        self.params_dtype = params_dtype
        local = intermediate_size_per_partition
        inner = local * self.moe.moe_parallel_config.tp_size
        shapes = {
            "w1": (inner, hidden_size, self.index_bits["w13"]),
            "w3": (inner, hidden_size, self.index_bits["w13"]),
            "w2": (hidden_size, inner, self.index_bits["w2"]),
        }
        self._loader = ExpertsLoader(layer, self.prefix, self.names, shapes)
        self._loader.check_possible = functools.partial(
            self._choose_rotation, hidden_size, inner, local
        )
        index_bits: dict[str, int] | None = self.index_bits
        try:
            self._loader.check_possible()
        except (FormatError, TensorError):
            if self._loader.dummy:
                raise
            index_bits = None
        sizes = num_experts, hidden_size, local
        make_plain = functools.partial(
            self._make_plain, layer, *sizes, params_dtype, **extra_weight_attrs
        )
        self._loader.form = ExpertsForm(
            layer, ExpertsShape(*sizes), index_bits, self._loader.load, make_plain, self.summary
        )
        if self.moe.has_bias and index_bits is not None:
            self._register_biases(layer, *sizes, **extra_weight_attrs)
        layer.load_weights = self._loader.wrap(layer.load_weights)
        logger.debug(
            "%s: %s index bits expected, %d experts of %d x %d on this rank",
            self.prefix,
            index_bits,
            num_experts,
            local,
            hidden_size,
        )

    def _make_plain(self, layer: Any, *sizes: Any, **extra_weight_attrs: Any) -> None:
        """Register the weights of plain experts."""
        if self.backend != "decode":
            self._plain = UnquantizedFusedMoEMethod(self.moe)
        arrived = {name: getattr(layer, name) for name in EXPERT_BIASES if hasattr(layer, name)}
        self._plain.create_weights(layer, *sizes, **extra_weight_attrs)
        for name, bias in arrived.items():
            layer.register_parameter(name, bias)

    def _register_biases(
        self, layer: Any, num_experts: int, hidden: int, inner: int, **extra_weight_attrs: Any
    ) -> None:
        """Register biases, which are never quantized, as vLLM's own method does."""
        shape = ExpertsShape(num_experts, hidden, inner)
        for stem in MATRICES:
            num_rows, _ = shape.of(stem)
            bias = torch.zeros(num_experts, num_rows, dtype=self.params_dtype)
            parameter = Parameter(bias, requires_grad=False)
            set_weight_attrs(parameter, extra_weight_attrs)
            layer.register_parameter(f"{stem}_bias", parameter)

    def _choose_rotation(self, hidden: int, inner: int, inner_of_rank: int) -> None:
        """Set the rotation block sizes.

        Raises:
            TensorError: the inner activation cannot be split over this many ranks.
            FormatError: config.json has no rotation block size for this number of inputs.
        """
        self.rotation_block_sizes = {
            "w13": self._rotation_block_size("w1", hidden),
            "w2": self._rotation_block_size("w2", inner),
        }
        self.check_split(inner, inner_of_rank)

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
        return None  # only vLLM's own kernels use such a config

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what arrived and bring it into the form that ``apply`` uses.

        Does nothing when called again, until vLLM has reloaded the layer.

        Raises:
            TensorError: a tensor is missing or holds impossible values.
        """
        if state_of(layer) is LayerState.READY:
            return
        self._loader.check_loaded()
        form = self._loader.form
        form.drop_other()
        if form.index_bits is None:
            layer._replace_quant_method(self._plain)
            self._plain.process_weights_after_loading(layer)
            return
        experts = {}
        for stem in MATRICES:
            qweight, row_norms, input_scales = (
                getattr(layer, f"{stem}_{suffix}").data for suffix in LAYER_TENSORS
            )
            for suffix in LAYER_TENSORS:
                delattr(layer, f"{stem}_{suffix}")
            take_turns = layer.activation == vllm_activation.MoEActivation.SWIGLUOAI
            if stem == "w13" and take_turns:  # gate and up rows alternate; their biases already do
                order = torch.arange(row_norms.shape[1]).view(len(MATRICES[stem]), -1).T.flatten()
                qweight, row_norms = qweight[:, :, order], row_norms[:, order]
            shared_scales = input_scales[0, 0].clone()
            block_size = self.rotation_block_sizes[stem]
            experts[stem] = [
                QuantizedWeight(planes, norms, shared_scales, block_size, self.format.code)
                for planes, norms in zip(qweight, row_norms, strict=True)
            ]
        self.use(layer, experts)

    def use(self, layer: Any, experts: dict[str, list[QuantizedWeight]]) -> None:
        """Give the layer the experts of this rank, w13 and w2, as ``apply`` uses them.

        Raises:
            TensorError: a value is impossible, or what it decodes to exceeds the layer's dtype.
        """
        shapes: list[QuantizedShape] = []
        for stem, weights in experts.items():
            matrices = len(MATRICES[stem])
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
            # Otherwise a reload would keep the weights that the kernel packed before.
            self._plain.moe_kernel = None
            self._plain.process_weights_after_loading(layer)
            self.moe_kernel = self._plain.moe_kernel
            self.moe_quant_config = self._plain.moe_quant_config
        else:
            warm_up_once(self.format, self.params_dtype, layer.w2_tiles.device, experts=True)
        mark_ready(layer)
        if self.summary.add_layer(shapes):
            logger.info("QAM-W: %s; %s code. %s", self.summary, self.format.code, self.describe())

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
        """For every token, the weighted sum over its experts; with parallelism, this rank's part.

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
        if layer.apply_router_weight_on_input:  # then each token has one expert
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        weights = {
            stem: tiled_weight_of(layer, self.rotation_block_sizes[stem], f"{stem}_")
            for stem in MATRICES
        }
        routing = _route(topk_ids, layer, x.dtype, list(weights.values()))
        both = self._multiply("w13", layer, weights["w13"], x, routing, topk_ids)
        inner = torch.empty(num_slots, both.shape[1] // 2, dtype=x.dtype, device=x.device)
        self._activate(layer, inner, both)
        y = self._multiply("w2", layer, weights["w2"], inner, routing, topk_ids)
        return combine(y, topk_weights.float())

    def _activate(self, layer: Any, inner: torch.Tensor, both: torch.Tensor) -> None:
        """Write f(gate, up) to inner [slots, inner size]; both [slots, 2 * inner size] has them."""
        options: dict[str, Any] = {}
        if hasattr(vllm_activation, "ApplyMoEActivationConfig"):
            limits = FusedMoEQuantConfig.make(
                gemm1_alpha=layer.swiglu_alpha,
                gemm1_beta=layer.swiglu_beta,
                gemm1_clamp_limit=layer.swiglu_limit,
            )
            config = vllm_activation.ApplyMoEActivationConfig.from_configs(self.moe, limits)
            options["activation_config"] = config
        vllm_activation.apply_moe_activation(layer.activation, inner, both, **options)

    def _multiply(
        self,
        stem: str,
        layer: Any,
        weight: TiledWeight,
        x: torch.Tensor,
        routing: Routing,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """For every slot, the product with the matrices of its expert, plus their bias."""
        y = routed_linear(x, weight, routing, topk_ids.numel())
        if not self.moe.has_bias:
            return y
        experts = topk_ids.flatten().long()
        if layer.expert_map is not None:
            experts = layer.expert_map[experts].long()
        bias = getattr(layer, f"{stem}_bias")[experts.clamp(min=0)]
        return y + torch.where(experts[:, None] >= 0, bias, 0)  # some experts are on other ranks


def check_supported(layer: Any, prefix: str) -> None:
    """Refuse experts whose computation is not implemented here.

    Raises:
        FormatError: names what is not implemented.
    """
    if not layer.moe_config.is_act_and_mul:
        raise FormatError(f"{prefix}: qamw does not support experts without a gate")
    if layer.swiglu_limit and not hasattr(vllm_activation, "ApplyMoEActivationConfig"):
        raise FormatError(f"{prefix}: this vLLM does not give the limits of the activation")


def names_of_matrices(layer: Any, prefix: str) -> dict[str, str]:
    """vLLM's shard id -> the matrix's name in the checkpoint.

    Raises:
        BackendError: this vLLM is too old to give the names.
    """
    if not hasattr(layer, "ckpt_gate_proj_name"):
        raise BackendError(
            f"{prefix}: experts need vLLM 0.25 or newer, which gives the names of their matrices"
        )
    return {
        "w1": layer.ckpt_gate_proj_name,
        "w3": layer.ckpt_up_proj_name,
        "w2": layer.ckpt_down_proj_name,
    }


def _route(
    topk_ids: torch.Tensor, layer: Any, dtype: torch.dtype, weights: Sequence[TiledWeight]
) -> Routing:
    """Sort the slots into blocks by expert, with vLLM's kernel on CUDA, else with the reference.

    Slots of experts on other ranks are left out, so that all programs are equally busy.
    """
    from qamw_kernels.ops.triton.launch import routed_block_size

    num_experts, expert_map = layer.global_num_experts, layer.expert_map
    block_size = routed_block_size(topk_ids.numel(), num_experts, dtype, weights)
    if not topk_ids.is_cuda:
        return sort_slots(topk_ids, block_size, num_experts, expert_map)
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    aligned = moe_align_block_size(
        topk_ids, block_size, num_experts, expert_map, ignore_invalid_experts=True
    )
    return Routing(*aligned, block_size)
