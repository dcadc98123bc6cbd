"""A quantised head: the linear layer that makes logits, cut along the vocabulary."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from qamw_kernels.codec.encode import QuantizedWeight
from qamw_kernels.format.config import QamwFormat, layer_tensors
from qamw_vllm.config import LoadSummary
from qamw_vllm.linear import QamwLinearMethod
from qamw_vllm.loading.linear import LayerLoader, Loader


class QamwHeadMethod(QamwLinearMethod):
    """vLLM's ParallelLMHead; rows that pad a rank's part of the vocabulary are zero."""

    def __init__(self, prefix: str, index_bits: int, format: QamwFormat, summary: LoadSummary) -> None:
        super().__init__(prefix, (prefix,), index_bits, format, summary)
        if self.backend == "decode":
            self._plain = UnquantizedEmbeddingMethod()

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
        """Register the packed tensors of this rank's part of the vocabulary."""
        self.params_dtype = params_dtype
        self.rotation_block_size = self.format.rotation_block_size_of(self.prefix, input_size)
        self._loader = LayerLoader(layer, self.parts, self.index_bits, input_size, 1)
        loaders = {"qweight": _rows_loader(layer, 1), "row_norms": _rows_loader(layer, 0), "input_scales": self._loader.load_input_scales}
        for name, (shape, dtype) in layer_tensors(sum(output_partition_sizes), input_size, self.index_bits).items():
            parameter = Parameter(torch.empty((1, *shape) if name == "input_scales" else shape, dtype=dtype), requires_grad=False)
            parameter.weight_loader = self._loader.wrap(name, loaders[name])  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)
        layer.weight_loader = self._loader.wrap("bias", layer.weight_loader)
        self.summary.expect()

    def _use(self, layer: Any, weight: QuantizedWeight) -> None:
        super()._use(layer, weight)
        if self.backend != "decode":  # vLLM's LoRA asks it for the dtype and the device
            layer.register_buffer("weight", torch.empty(0, dtype=self.params_dtype, device=weight.qweight.device), persistent=False)


def _rows_loader(layer: Any, dim: int) -> Loader:
    """Copies the rows of this rank's words; ``dim`` counts the rows."""

    def load(param: Parameter, loaded: torch.Tensor) -> None:
        start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        param.data.narrow(dim, 0, end - start).copy_(loaded.narrow(dim, start, end - start))
        param.data.narrow(dim, end - start, param.shape[dim] - (end - start)).zero_()

    return load
