"""How a plain checkpoint is quantized while it is loaded."""

from collections.abc import Callable, Sequence

import torch

from qamw_kernels.format.codebook import PLAIN
from qamw_kernels.format.config import QamwFormat
from qamw_kernels.format.defaults import BITS_PER_WEIGHT
from qamw_kernels.format.rates import index_bits_of_rate
from qamw_kernels.format.sharding import choose_rotation_block_sizes
from qamw_vllm.parallel import sum_over_ranks


class OnlinePlan:
    """What is quantized and how: as ``qamw quantize --calibration none`` does it.

    Args:
        bits_per_weight: 3, 3.5 ... 6, of every layer.
        code: one of CODES.
        sum_over_ranks: sums a tensor over the tensor-parallel ranks.

    Attributes:
        index_bits: bits per pair of every layer.

    Raises:
        FormatError: another rate or code.
    """

    def __init__(
        self,
        bits_per_weight: object = BITS_PER_WEIGHT,
        code: str = PLAIN,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = sum_over_ranks,
    ) -> None:
        self.index_bits = index_bits_of_rate(bits_per_weight)
        self.code = code
        QamwFormat(self.index_bits, {}, code=code)  # refuses unknown codes
        self.sum_over_ranks = sum_over_ranks
        self._layers: set[tuple[int, bool]] = set()

    def add_layer(self, num_inputs: int, row_parallel: bool) -> None:
        """Record a layer that was made; all are made before the first is loaded.

        Args:
            num_inputs: of the whole layer.
            row_parallel: whether tensor parallelism cuts its inputs.
        """
        self._layers.add((num_inputs, row_parallel))

    def format(self, tp_sizes: Sequence[int]) -> QamwFormat:
        """The format of the checkpoint that the recorded layers would make.

        Args:
            tp_sizes: tensor-parallel sizes that the model allows.
        """
        rotation_block_sizes = choose_rotation_block_sizes(self._layers, tp_sizes)
        return QamwFormat(self.index_bits, rotation_block_sizes, code=self.code)
