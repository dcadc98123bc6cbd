"""Quantized linear layers: fused or plain, column parallel, row parallel or replicated."""

import functools
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

from qamw_kernels.codec.decode import decode_checked
from qamw_kernels.errors import FormatError, TensorError
from qamw_kernels.format.config import QamwFormat
from qamw_kernels.format.rates import QuantizedShape
from qamw_kernels.format.sharding import check_input_split
from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.linear import linear
from qamw_kernels.ops.weight import TiledWeight
from qamw_vllm.backend import Backend, choose_backend, describe_backend, warm_up_once
from qamw_vllm.loading.form import FORM_TENSORS, LayerForm, LayerShape
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
    """One vLLM linear layer of a quantized checkpoint.

    It is quantized if quantized tensors arrive for it; if a plain weight does, it becomes a plain
    layer of vLLM.

    With the ``triton`` backend a quantized layer keeps the packed weight, as the tiles that kernels
    read; with ``decode`` it becomes a plain linear layer while loading, and vLLM's own CPU matrix
    multiplication runs.

    Args:
        prefix: the layer's name in vLLM.
        parts: names of the checkpoint's modules that it holds.
        index_bits: bits per pair that config.json gives for all parts.
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
        self._plain = self.make_plain_method()

    def find_name(self, name: str) -> None:
        """Take the layer's name in vLLM's model, if the model class gave it no prefix."""
        if not self.prefix or self.prefix.startswith("."):
            self.prefix, self.parts = name, (name,)

    def take_loader(self) -> None:
        """Take the loader that the model class has set on the layer, if it has set one."""
        self._loader.take_loader()

    def make_plain_method(self) -> UnquantizedLinearMethod | UnquantizedEmbeddingMethod:
        """vLLM's method for a decoded layer, and for one that is not quantized.

        It is delegated to, not inherited from: vLLM treats layers whose method is a subclass of it
        as unquantized.
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
        """Register the tensors of this rank, as the checkpoint holds them.

        A layer that cannot be quantized is expected to be plain: one with a number of inputs that
        has no rotation block size, or that cannot be split over this many ranks. If quantized
        tensors arrive for it, they are refused then.

        Raises:
            TensorError: random weights are to be loaded, and the inputs cannot be split.
        """
        self.params_dtype = params_dtype
        num_rows, num_shards = sum(output_partition_sizes), len(output_partition_sizes)
        self._loader = LayerLoader(layer, self.parts, self.index_bits, input_size, num_shards)
        self._loader.check_possible = functools.partial(
            self._choose_rotation, input_size, input_size_per_partition
        )
        index_bits: int | None = self.index_bits
        try:
            self._loader.check_possible()
        except (FormatError, TensorError):
            if self._loader.dummy and input_size in self.format.rotation_block_sizes:
                raise
            index_bits = None
        load = extra_weight_attrs["weight_loader"]
        for name in FORM_TENSORS:
            scales = name == "input_scales"
            self._loader.wrap(name, self._loader.load_input_scales if scales else load)
        shape = LayerShape(num_rows, input_size_per_partition, num_shards, params_dtype)
        self._loader.form = LayerForm(layer, shape, index_bits, self._loader.loaders, self.summary)
        # The layer makes its bias after this call, with its attribute weight_loader: so the
        # arrival of the bias is noted too.
        layer.weight_loader = self._loader.wrap("bias", layer.weight_loader)
        logger.debug(
            "%s: %s index bits expected, %d x %d on this rank",
            self.prefix,
            index_bits,
            num_rows,
            input_size_per_partition,
        )

    def _choose_rotation(self, num_inputs: int, num_inputs_of_rank: int) -> None:
        """Set the rotation block size.

        Raises:
            TensorError: the inputs of a row-parallel layer cannot be split over this many ranks.
            FormatError: config.json has no rotation block size for this number of inputs.
        """
        block = self.format.rotation_block_size_of(self.parts[0], num_inputs)
        check_input_split(self.prefix, num_inputs, num_inputs_of_rank, block)
        self.rotation_block_size = block

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what arrived and bring it into the form that ``apply`` uses.

        Does nothing when called again, until vLLM has reloaded the layer.

        Raises:
            TensorError: a tensor is missing or holds impossible values.
        """
        if state_of(layer) is LayerState.READY:
            return
        self._loader.check_loaded()
        if (form := self._loader.form) is not None:
            form.drop_other()
            if form.index_bits is None:
                layer.quant_method = self._plain
                self._plain.process_weights_after_loading(layer)
                return
        weight = QuantizedWeight(
            layer.qweight.data,
            layer.row_norms.data,
            layer.input_scales.data[0].clone(),
            self.rotation_block_size,
            self.format.code,
        )
        del layer.qweight, layer.row_norms, layer.input_scales
        self.use(layer, weight)

    def use(self, layer: Any, weight: QuantizedWeight) -> None:
        """Give the layer its weight, or this rank's part of it, in the form that ``apply`` uses.

        Raises:
            TensorError: a value is impossible, or what it decodes to exceeds the layer's dtype.
        """
        name = " / ".join(self.parts)
        # Parameters of torch: vLLM's own classes of parameters only matter while loading.
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
            logger.info("QAM-W: %s; %s code. %s", self.summary, weight.code, self.describe())

    def describe(self) -> str:
        """What runs, and why."""
        return describe_backend(self.backend, self.params_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K of this rank] to [..., N of this rank], in the dtype of x."""
        if self.backend == "decode":  # constant: torch.compile traces only one branch
            return self._plain.apply(layer, x, bias)
        return linear(x, tiled_weight_of(layer, self.rotation_block_size), bias)
