"""Quantised linear layers: fused or plain, column parallel, row parallel or replicated, on CUDA and on the CPU."""

import functools
import os
import time
from typing import Any

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter
from vllm.platforms import current_platform

from qamw_kernels.ops import linear as ops
from qamw_kernels.codec.encode import InputShard, QuantizedWeight, decode_weight, encode_weight, make_input_scales
from qamw_kernels.format.config import QamwFormat, layer_tensors
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.format.sharding import choose_rotation_block_sizes, possible_tensor_parallel_sizes
from qamw_kernels.ops.tiling import tile_planes
from qamw_vllm.config import LoadSummary, WhileLoading
from qamw_vllm.loading.linear import LayerLoader

logger = init_logger(f"vllm.{__name__}")  # vLLM shows the messages of loggers below its own name

CPU_BACKEND_VARIABLE = "QAMW_CPU_BACKEND"
_ROWS_AT_ONCE = 4096
"""Rows decoded at a time, so that the float32 intermediate of a large layer stays small."""


def choose_backend() -> str:
    """``triton`` or ``decode``. CUDA has one backend; on the CPU ``QAMW_CPU_BACKEND`` decides, ``decode`` by default.

    Raises:
        ValueError: another platform, an unknown value, or ``triton`` on the CPU without the interpreter.
    """
    if current_platform.is_cuda():
        return "triton"
    if not current_platform.is_cpu():
        raise ValueError(f"qamw runs on CUDA and on the CPU, not on {current_platform.device_name}")
    backend = os.environ.get(CPU_BACKEND_VARIABLE, "decode")
    if backend not in ("decode", "triton"):
        raise ValueError(f"{CPU_BACKEND_VARIABLE} must be 'decode' or 'triton', got {backend!r}")
    if backend == "triton" and not ops.INTERPRETED:
        raise ValueError(f"{CPU_BACKEND_VARIABLE}=triton runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1 too")
    return backend


def check_split(prefix: str, input_size: int, input_size_per_partition: int, rotation_block_size: int) -> None:
    """Raise ValueError where a rank's inputs are not whole rotation blocks and packing units."""
    unit = max(UNIT_INPUTS, rotation_block_size)  # both are powers of two
    if input_size_per_partition % unit:
        possible = [tp for tp in range(1, input_size // unit + 1) if input_size % (tp * unit) == 0]
        tp = input_size // input_size_per_partition
        raise ValueError(
            f"{prefix}: tensor_parallel_size={tp} leaves {input_size_per_partition} of the {input_size} inputs to a rank, "
            f"expected a multiple of {unit} (rotation blocks of {rotation_block_size}, packed units of {UNIT_INPUTS}). "
            f"Possible for this layer: {', '.join(map(str, possible))}."
            + (" Quantise with a larger --tp-max for more." if rotation_block_size > UNIT_INPUTS else ""))


def warm_up_once(format: QamwFormat, dtype: torch.dtype, device: torch.device, experts: bool = False) -> None:
    """Compile the kernels of a whole model, once in this process and once with experts: before graphs are captured, not while serving."""
    rates = frozenset({format.index_bits, *format.layer_index_bits.values()})
    _warm_up(rates, frozenset(format.rotation_block_sizes.values()), dtype, device, experts)


@functools.cache
def _warm_up(rates: frozenset[int], rotation_block_sizes: frozenset[int], dtype: torch.dtype, device: torch.device, experts: bool) -> None:
    from qamw_kernels.ops.triton import launch as triton_launch

    start = time.perf_counter()
    triton_launch.warm_up(rates, rotation_block_sizes, dtype, device, experts)
    logger.info("QAM-W: kernels for index bits %s were ready after %.1f s", sorted(rates), time.perf_counter() - start)


def backend_says(backend: str, dtype: torch.dtype) -> str:
    """What runs, and why."""
    if backend == "decode":
        return (f"Decoded to {dtype} while loading, for vLLM's own matrix multiplication, because this is a CPU: "
                "the memory is that of 16 bits")
    if current_platform.is_cpu():
        return "They stay packed; Triton kernels run in the interpreter (slow)"
    from qamw_kernels.ops.gluon import launch as gluon_launch

    return ("They stay packed; the Gluon kernel decodes them" if gluon_launch.kernels is not None else
            "They stay packed; a plain Triton kernel decodes them, because this Triton has no shared-memory gather (3.7.1 has)")


def decode_rows(quantized: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of this rank in ``dtype``."""
    weight = torch.empty(quantized.shape, dtype=dtype)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        weight[part] = decode_weight(quantized.rows(part))
    return weight


@register_weight_loader_v2_supported_method
class QamwLinearMethod(LinearMethodBase):
    """One quantised vLLM linear layer.

    With the ``triton`` backend the layer keeps the packed weight, as the tiles that kernels read; with ``decode`` it becomes a
    plain linear layer while loading, and vLLM's own CPU matrix multiplication runs.

    Args:
        prefix: the layer's name in vLLM.
        parts: names of the checkpoint's modules that it holds.
        index_bits: bits per pair of all parts.
        format: the checkpoint's format.
        summary: of all layers of the model in this process.
    """

    def __init__(self, prefix: str, parts: tuple[str, ...], index_bits: int, format: QamwFormat, summary: LoadSummary) -> None:
        self.prefix = prefix
        self.parts = parts
        self.index_bits = index_bits
        self.format = format
        self.summary = summary
        self.backend = choose_backend()
        if self.backend == "decode":
            # Delegated to, not inherited from: vLLM takes subclasses for unquantised layers.
            self._plain: UnquantizedLinearMethod | UnquantizedEmbeddingMethod = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,  # a LinearBase of vLLM, whose attributes torch's stubs do not know
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the packed tensors of this rank, as the checkpoint holds them.

        Raises:
            ValueError: the inputs of a row-parallel layer cannot be split over this many ranks.
        """
        self.params_dtype = params_dtype
        self.rotation_block_size = self.format.rotation_block_size_of(self.parts[0], input_size)
        check_split(self.prefix, input_size, input_size_per_partition, self.rotation_block_size)
        self._loader = LayerLoader(layer, self.parts, self.index_bits, input_size, len(output_partition_sizes))
        load = extra_weight_attrs["weight_loader"]
        empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype)
                 in layer_tensors(sum(output_partition_sizes), input_size_per_partition, self.index_bits).items()}
        layer.register_parameter("qweight", ModelWeightParameter(
            data=empty["qweight"], output_dim=1, input_dim=2, weight_loader=self._loader.wrap("qweight", load)))
        layer.register_parameter("row_norms", ChannelQuantScaleParameter(
            data=empty["row_norms"], output_dim=0, weight_loader=self._loader.wrap("row_norms", load)))
        # One row per stacked matrix: each brings its own copy, and that they agree is verified later.
        layer.register_parameter("input_scales", BasevLLMParameter(
            data=empty["input_scales"].repeat(len(output_partition_sizes), 1),
            weight_loader=self._loader.wrap("input_scales", self._loader.load_input_scales)))
        # The layer makes its bias after this call, with its attribute weight_loader: so its arrival is noted too.
        layer.weight_loader = self._loader.wrap("bias", layer.weight_loader)

        self.summary.expect()
        logger.debug("%s: %d index bits, rotation blocks of %d, %d x %d on this rank", self.prefix, self.index_bits,
                     self.rotation_block_size, sum(output_partition_sizes), input_size_per_partition)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Verify what arrived and bring it into the form that ``apply`` uses. Does nothing when called again.

        Raises:
            ValueError: a tensor is missing or holds impossible values.
        """
        input_scales = getattr(layer, "input_scales", None)
        if input_scales is None or input_scales.ndim == 1:
            return
        self._loader.verify()
        weight = QuantizedWeight(layer.qweight.data, layer.row_norms.data, input_scales.data[0].clone(), self.rotation_block_size)
        del layer.qweight, layer.row_norms, layer.input_scales
        self._use(layer, weight)

    def _use(self, layer: Any, weight: QuantizedWeight) -> None:
        """Give the layer its weight in the form that ``apply`` uses."""
        num_rows, num_inputs = weight.shape
        if self.summary.add((weight.qweight, weight.row_norms, weight.input_scales), num_rows * num_inputs):
            logger.info("QAM-W: %s. %s", self.summary, self._says())
        # Plain parameters: vLLM's own classes only matter while loading.
        if self.backend == "decode":
            layer.register_parameter("weight", Parameter(decode_rows(weight, self.params_dtype), requires_grad=False))
            self._plain.process_weights_after_loading(layer)
            return
        layer.qweight = Parameter(tile_planes(weight.qweight), requires_grad=False)  # the name by which vLLM's LoRA finds the device
        layer.row_norms = Parameter(weight.row_norms, requires_grad=False)
        layer.input_scales = Parameter(weight.input_scales, requires_grad=False)
        device = weight.qweight.device
        layer.register_buffer("quadrant_words", ops.quadrant_words(self.index_bits, device), persistent=False)
        if current_platform.is_cuda():
            warm_up_once(self.format, self.params_dtype, device)

    def _says(self) -> str:
        """What runs, and why."""
        return backend_says(self.backend, self.params_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K of this rank] to [..., N of this rank], in the dtype of x."""
        if self.backend == "decode":  # fixed when the layer was made, so a compiled graph holds one branch
            return self._plain.apply(layer, x, bias)
        return ops.linear(
            x, layer.qweight, layer.row_norms, layer.input_scales, layer.quadrant_words, bias, self.rotation_block_size)


def tp_sizes_of_model() -> list[int]:
    """Tensor-parallel sizes that the attention heads of the model that is being made allow."""
    config = get_current_vllm_config_or_none()
    text = config.model_config.hf_text_config if config is not None and config.model_config is not None else None
    heads = getattr(text, "num_attention_heads", None)
    return possible_tensor_parallel_sizes(heads, getattr(text, "num_key_value_heads", None) or heads)


def add_up_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the tensor-parallel ranks, in place."""
    torch.distributed.all_reduce(tensor, group=get_tp_group().device_group)
    return tensor


class QamwLoadingLinearMethod(QamwLinearMethod):
    """One linear layer of a plain checkpoint, quantised as soon as its weight has arrived: one is in memory at a time.

    The weights are bit for bit those of ``qamw quantize --calibration none``. With tensor parallelism, ranks that hold some of
    the inputs share the norms of the whole rows.

    Args:
        plan: of the whole model; the others are those of :class:`QamwLinearMethod`.
    """

    uses_meta_device = True

    def __init__(self, prefix: str, parts: tuple[str, ...], plan: WhileLoading, summary: LoadSummary) -> None:
        super().__init__(prefix, parts, plan.index_bits, QamwFormat(plan.index_bits, {}), summary)
        self.plan = plan
        self._tp_sizes = tp_sizes_of_model()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the plain weight, which takes no memory before it is loaded."""
        self.params_dtype, self._input_size = params_dtype, input_size
        self.plan.layers.add((input_size, isinstance(layer, RowParallelLinear)))
        self.summary.expect()
        self._loader = LayerLoader(layer, self.parts, self.index_bits, input_size, len(output_partition_sizes))
        shape = sum(output_partition_sizes), input_size_per_partition
        layer.register_parameter("weight", ModelWeightParameter(
            data=torch.empty(shape, dtype=params_dtype, device="meta"), output_dim=0, input_dim=1,
            weight_loader=self._loader.wrap("weight", extra_weight_attrs["weight_loader"])))
        layer.weight_loader = self._loader.wrap("bias", layer.weight_loader)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantise the weight. Does nothing when called again.

        Raises:
            ValueError: the checkpoint lacks it, a value is not finite, or the inputs cannot be split over this many ranks.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        layer._already_called_process_weights_after_loading = True
        self._loader.check_complete(("weight",))
        sizes = choose_rotation_block_sizes(self.plan.layers, self._tp_sizes)
        weight, self.rotation_block_size = layer.weight.data, sizes[self._input_size]
        del layer.weight
        check_split(self.prefix, self._input_size, weight.shape[1], self.rotation_block_size)
        input_scales, shard = make_input_scales(self._input_size), None
        if weight.shape[1] != self._input_size:
            input_scales = input_scales[layer.tp_rank * weight.shape[1] :][: weight.shape[1]].clone()
            shard = InputShard(self._input_size, add_up_over_ranks)
        quantized = encode_weight(weight, self.index_bits, self.rotation_block_size, input_scales, f"{self.prefix}.weight",
                                  shard=shard)
        self.format = QamwFormat(self.index_bits, sizes)
        self._use(layer, quantized)

    def _says(self) -> str:
        return f"Quantised while loading. {super()._says()}"
