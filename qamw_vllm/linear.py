"""Quantized linear layers: fused or plain, column parallel, row parallel or replicated."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
)

from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.format.config import QamwFormat, layer_tensors
from qamw_kernels.format.rates import QuantizedShape
from qamw_kernels.format.sharding import check_input_split
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.linear import linear
from qamw_kernels.ops.weight import TiledWeight
from qamw_vllm.backend import Backend, choose_backend, describe_backend, warm_up_once
from qamw_vllm.loading.linear import LayerLoader
from qamw_vllm.state import (
    LayerState,
    LoadSummary,
    mark_ready,
    register_tiled_weight,
    state_of,
    tiled_weight_of,
)

logger = init_logger(f"vllm.{__name__}")  # vLLM shows messages of loggers below its own name


@register_weight_loader_v2_supported_method
class QamwLinearMethod(LinearMethodBase):
    """One quantized vLLM linear layer.

    With the ``triton`` backend the layer keeps the packed weight, as the tiles that kernels read;
    with ``decode`` it becomes a plain linear layer while loading, and vLLM's own CPU matrix
    multiplication runs.

    Args:
        prefix: the layer's name in vLLM.
        parts: names of the checkpoint's modules that it holds.
        index_bits: bits per pair of all parts.
        format: the checkpoint's format.
        summary: of all layers of the model in this process.
        backend: None for that of this machine, see :func:`choose_backend`.
    """

    def __init__(
        self,
        prefix: str,
        parts: tuple[str, ...],
        index_bits: int,
        format: QamwFormat,
        summary: LoadSummary,
        backend: Backend | None = None,
    ) -> None:
        self.prefix = prefix
        self.parts = parts
        self.index_bits = index_bits
        self.format = format
        self.summary = summary
        self.backend = backend or choose_backend()
        if self.backend == "decode":
            self._plain = self.make_plain_method()

    def make_plain_method(self) -> UnquantizedLinearMethod | UnquantizedEmbeddingMethod:
        """vLLM's method for a decoded layer.

        It is delegated to, not inherited from: vLLM takes subclasses for unquantized layers.
        """
        return UnquantizedLinearMethod()

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
            TensorError: the inputs of a row-parallel layer cannot be split over this many ranks.
            FormatError: config.json has no rotation block size for this number of inputs.
        """
        num_rows, num_shards = sum(output_partition_sizes), len(output_partition_sizes)
        self.params_dtype = params_dtype
        self.rotation_block_size = self.format.rotation_block_size_of(self.parts[0], input_size)
        check_input_split(
            self.prefix, input_size, input_size_per_partition, self.rotation_block_size
        )
        self._loader = LayerLoader(layer, self.parts, self.index_bits, input_size, num_shards)
        load = extra_weight_attrs["weight_loader"]
        tensors = layer_tensors(num_rows, input_size_per_partition, self.index_bits)
        empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
        qweight = ModelWeightParameter(
            data=empty["qweight"],
            output_dim=1,
            input_dim=2,
            weight_loader=self._loader.wrap("qweight", load),
        )
        row_norms = ChannelQuantScaleParameter(
            data=empty["row_norms"],
            output_dim=0,
            weight_loader=self._loader.wrap("row_norms", load),
        )
        # One row per stacked matrix: each brings its own copy, and that they agree is checked
        # after loading.
        input_scales = BasevLLMParameter(
            data=empty["input_scales"].repeat(num_shards, 1),
            weight_loader=self._loader.wrap("input_scales", self._loader.load_input_scales),
        )
        layer.register_parameter("qweight", qweight)
        layer.register_parameter("row_norms", row_norms)
        layer.register_parameter("input_scales", input_scales)
        # The layer makes its bias after this call, with its attribute weight_loader: so the
        # arrival of the bias is noted too.
        layer.weight_loader = self._loader.wrap("bias", layer.weight_loader)

        self.summary.expect_layer()
        logger.debug(
            "%s: %d index bits, rotation blocks of %d, %d x %d on this rank",
            self.prefix,
            self.index_bits,
            self.rotation_block_size,
            num_rows,
            input_size_per_partition,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what arrived and bring it into the form that ``apply`` uses.

        Does nothing when called again, until vLLM has reloaded the layer.

        Raises:
            TensorError: a tensor is missing or holds impossible values.
        """
        if state_of(layer) is LayerState.READY:
            return
        self._loader.check_loaded()
        weight = QuantizedWeight(
            layer.qweight.data,
            layer.row_norms.data,
            layer.input_scales.data[0].clone(),
            self.rotation_block_size,
        )
        del layer.qweight, layer.row_norms, layer.input_scales
        self.use(layer, weight)

    def use(self, layer: Any, weight: QuantizedWeight) -> None:
        """Give the layer its weight, or this rank's part of it, in the form that ``apply`` uses.

        Raises:
            TensorError: a value cannot be, or the layer's dtype does not hold what it decodes to.
        """
        name = " / ".join(self.parts)
        # Plain parameters: vLLM's own classes only matter while loading.
        if self.backend == "decode":
            decoded = decode_checked(weight, name, self.params_dtype)
            layer.register_parameter("weight", Parameter(decoded, requires_grad=False))
            self._plain.process_weights_after_loading(layer)
        else:
            weight.check(name)
            register_tiled_weight(layer, TiledWeight.of(weight))
            warm_up_once(self.format, self.params_dtype, weight.qweight.device)
        mark_ready(layer)
        if self.summary.add_layer([QuantizedShape(*weight.shape, weight.index_bits)]):
            logger.info("QAM-W: %s. %s", self.summary, self.describe())

    def describe(self) -> str:
        """What runs, and why."""
        return describe_backend(self.backend, self.params_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K of this rank] to [..., N of this rank], in the dtype of x."""
        if self.backend == "decode":  # fixed when the layer was made: a graph holds one branch
            return self._plain.apply(layer, x, bias)
        return linear(x, tiled_weight_of(layer, self.rotation_block_size), bias)
