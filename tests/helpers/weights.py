"""Random quantized weights for the tests of the kernels, and the error that a codebook may have."""

import torch

from qamw_kernels.format.codebook import PLAIN
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.format.weight import QuantizedWeight

# Index bits -> limit of the mean squared error, relative to the variance, of Gaussian coordinates.
NMSE_CEILING = {
    6: 0.0307,
    7: 0.0156,
    8: 0.00785,
    9: 0.00398,
    10: 0.0020,
    11: 0.00101,
    12: 0.000507,
}


def random_weight(
    num_rows: int,
    num_inputs: int,
    index_bits: int,
    rotation_block_size: int = 64,
    seed: int = 0,
    device: str = "cpu",
    code: str = PLAIN,
) -> QuantizedWeight:
    """Random indices, row norms over four octaves and signed input scales.

    Every index occurs equally often, as far as the size allows.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_rows * num_inputs // 2, generator=generator)
    indices = (order % 2**index_bits).view(num_rows, -1)
    row_norms = torch.rand(num_rows, generator=generator).mul(4).sub(2).exp2()
    signs = torch.randint(0, 2, (num_inputs,), generator=generator) * 2 - 1
    input_scales = (signs * (0.5 + torch.rand(num_inputs, generator=generator))).half()
    return QuantizedWeight(
        pack_planes(indices, index_bits).to(device),
        row_norms.to(device),
        input_scales.to(device),
        rotation_block_size,
        code,
    )
