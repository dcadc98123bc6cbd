"""A quantized head: the linear layer that makes logits, cut along the vocabulary."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from qamw_kernels.format.config import QamwFormat, layer_tensors
from qamw_kernels.format.weight import QuantizedWeight
from qamw_vllm.backend import Backend
from qamw_vllm.linear import QamwLinearMethod
from qamw_vllm.loading.linear import LayerLoader, Loader
from qamw_vllm.state import LoadSummary


class QamwHeadMethod(QamwLinearMethod):
    """The method of a quantized ParallelLMHead of vLLM.

    Rows that pad a rank's part of the vocabulary are zero.

    Args:
        prefix: the head's name in vLLM; the others are those of :class:`QamwLinearMethod`.
    """

    def __init__(
        self,
        prefix: str,
        index_bits: int,
        format: QamwFormat,
        summary: LoadSummary,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(prefix, (prefix,), index_bits, format, summary, backend)

    def take_loader(self) -> None:
        """Do nothing: no model class gives its head a loader of its own."""

    def make_plain_method(self) -> UnquantizedEmbeddingMethod:
        return UnquantizedEmbeddingMethod()

    def use(self, layer: Any, weight: QuantizedWeight) -> None:
        super().use(layer, weight)
        if self.backend != "decode":
            # LoRA on the head (vllm/lora/utils.py) reads dtype and device of its plain weight.
            # Empty, and not a parameter: vLLM's reload neither loads nor copies it.
            stand_in = torch.empty(0, dtype=self.params_dtype, device=weight.qweight.device)
            layer.register_buffer("weight", stand_in, persistent=False)

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
        loaders = {
            "qweight": vocabulary_loader(layer, 1),
            "row_norms": vocabulary_loader(layer, 0),
            "input_scales": self._loader.load_input_scales,
        }
        tensors = layer_tensors(sum(output_partition_sizes), input_size, self.index_bits)
        for name, (shape, dtype) in tensors.items():
            if name == "input_scales":
                shape = (1, *shape)  # one row for every stacked matrix, as in other layers
            parameter = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            loader = self._loader.wrap(name, loaders[name])
            parameter.weight_loader = loader  # type: ignore[attr-defined]  # vLLM looks for it
            layer.register_parameter(name, parameter)
        layer.weight_loader = self._loader.wrap("bias", layer.weight_loader)
        self.summary.expect_layer()


def vocabulary_loader(layer: Any, dim: int) -> Loader:
    """A loader that copies the rows of this rank's part of the vocabulary, and zeroes the padding.

    The padding is not zero by itself: vLLM's reload passes parameters of uninitialized memory.

    Args:
        layer: vLLM's ParallelLMHead.
        dim: the dimension of the parameter that counts the rows.
    """

    def load(param: Parameter, loaded: torch.Tensor) -> None:
        start = layer.shard_indices.org_vocab_start_index
        num_words = layer.shard_indices.org_vocab_end_index - start
        padding = param.shape[dim] - num_words
        param.data.narrow(dim, 0, num_words).copy_(loaded.narrow(dim, start, num_words))
        param.data.narrow(dim, num_words, padding).zero_()

    return load
