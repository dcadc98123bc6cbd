"""Linear layers of a plain checkpoint, quantized while loading."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.parameter import ModelWeightParameter

from qamw_kernels.errors import FormatError
from qamw_kernels.format.config import QamwFormat
from qamw_kernels.format.sharding import check_input_split
from qamw_vllm.backend import Backend
from qamw_vllm.linear import QamwLinearMethod
from qamw_vllm.loading.linear import LayerLoader
from qamw_vllm.loading.load_formats import current_load_format
from qamw_vllm.online.encode import encode_shard
from qamw_vllm.online.plan import OnlinePlan
from qamw_vllm.parallel import tensor_parallel_sizes_of_model
from qamw_vllm.state import LayerState, LoadSummary, state_of


class QamwOnlineLinearMethod(QamwLinearMethod):
    """One linear layer, quantized as soon as its weight has arrived.

    So only one plain weight is in memory at a time.

    The weights are bit for bit those of ``qamw quantize --calibration none``, of a checkpoint in
    the layer's dtype. Which layers are quantized is known when all layers of the model are made:
    then :meth:`start` or :meth:`leave` is called.

    Args:
        plan: of the whole model; the others are those of :class:`QamwLinearMethod`.
    """

    uses_meta_device = True
    _started = False

    def __init__(
        self,
        prefix: str,
        parts: tuple[str, ...],
        plan: OnlinePlan,
        summary: LoadSummary,
        backend: Backend | None = None,
    ) -> None:
        unknown_yet = QamwFormat(plan.index_bits, {}, code=plan.code)  # until all layers are made
        super().__init__(prefix, parts, plan.index_bits, unknown_yet, summary, backend)
        self.plan = plan
        self._tp_sizes = tensor_parallel_sizes_of_model()

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
        self.params_dtype, self._num_inputs = params_dtype, input_size
        self._device = torch.get_default_device()
        num_shards = len(output_partition_sizes)
        self._loader = LayerLoader(layer, self.parts, self.index_bits, input_size, num_shards)
        shape = sum(output_partition_sizes), input_size_per_partition
        weight = ModelWeightParameter(
            data=torch.empty(shape, dtype=params_dtype, device="meta"),
            output_dim=0,
            input_dim=1,
            weight_loader=self._loader.wrap("weight", extra_weight_attrs["weight_loader"]),
        )
        layer.register_parameter("weight", weight)
        layer.weight_loader = self._loader.wrap("bias", layer.weight_loader)

    def start(self, layer: Any) -> None:
        """Make this a layer to quantize; all of a model are started before the first is loaded."""
        self._started = self._loader.checks_source = True
        if hasattr(layer, "_use_min_latency_gemm"):  # set by DeepSeek's class; reads layer.weight
            layer._use_min_latency_gemm = False
        self.plan.add_layer(self._num_inputs, isinstance(layer, RowParallelLinear))
        self.summary.expect_layer()
        initialize_online_processing(layer)

    def leave(self, layer: Any) -> None:
        """Turn it into a plain layer of vLLM."""
        with self._device:
            layer.weight = materialize_meta_tensor(layer.weight)
        layer.quant_method = self._plain

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize the weight. Does nothing when called again, until vLLM has reloaded the layer.

        Raises:
            TensorError: the checkpoint lacks it, a value is not finite, or the inputs cannot be
                split over this many ranks.
            FormatError: the layer was loaded by a loader that is not this plugin's.
        """
        if state_of(layer) is LayerState.READY:
            return
        if not self._started:
            raise FormatError(
                f"{self.prefix}: load_format={current_load_format()!r}: its loader cannot quantize "
                "while loading; leave the option out, or run qamw quantize first"
            )
        self._loader.check_complete(("weight",))
        self.format = self.plan.format(self._tp_sizes)
        block = self.format.rotation_block_size_of(self.prefix, self._num_inputs)
        self.rotation_block_size = block
        weight = layer.weight.data
        del layer.weight
        check_input_split(self.prefix, self._num_inputs, weight.shape[1], block)
        name = f"{self.prefix}.weight"
        quantized = encode_shard(weight, name, self.plan, self._num_inputs, block, layer.tp_rank)
        self.use(layer, quantized)

    def describe(self) -> str:
        return f"Quantized while loading. {super().describe()}"
