"""Encoding in plain torch, on any device: one weight matrix to three tensors.

    U = rotate(W / input_scales / row_norms)   coordinates of unit variance or less, nearly Gaussian
    indices = nearest codeword of each pair (U[n, 2p], U[n, 2p + 1]), or the best path of a trellis
    W^ = row_norms * unrotate(decoded indices) * input_scales

``input_scales`` [K] holds rotation signs and channel scales in one vector,
``rotation_signs / channel_scales``. All layers that read the same activation share it, so the
activation is scaled and rotated once.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qamw_kernels.codec import trellis
from qamw_kernels.codec.decode import decode_indices
from qamw_kernels.codec.nearest import grid, nearest
from qamw_kernels.codec.rotation import rotate
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import PLAIN, TRELLIS
from qamw_kernels.format.packing import pack_planes, packed_shape
from qamw_kernels.format.weight import (
    QuantizedWeight,
    check_finite,
    check_input_scales,
    largest_row_norm,
)

Coder = Callable[[torch.Tensor], torch.Tensor]
"""Maps coordinates [n, K] float32 to their indices, or to what they are once coded and decoded."""

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of weights that can be quantized. Others are packed, scaled or of another format."""

ENCODE_CHUNK = 1 << 18
"""Weights encoded at once: bounds the temporaries and keeps them in cache."""

HEAVY_TAIL = 4.0
"""Kurtosis of a row's coordinates above which its norm may be raised; it is 3 for a Gaussian."""

ROW_FACTORS = (1, 1.15, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 6)
"""By how much a norm may be raised."""


@dataclass(frozen=True)
class InputShard:
    """What the encoder needs to know of whole rows when it is given only some of their inputs.

    Attributes:
        num_inputs: of the whole rows.
        add_up: sums a float64 tensor over all shards.
    """

    num_inputs: int
    add_up: Callable[[torch.Tensor], torch.Tensor]


def check_source_dtype(name: str, dtype: torch.dtype) -> None:
    """Check the dtype in which a checkpoint stores the weight ``name``.

    Raises:
        TensorError: none of SOURCE_DTYPES.
    """
    if dtype not in SOURCE_DTYPES:
        raise TensorError(f"{name} is {dtype}, expected bfloat16, float16 or float32")


def make_input_scales(
    num_inputs: int,
    channel_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Random rotation signs divided by channel scales: ``rotation_signs / channel_scales``.

    The signs depend on ``num_inputs`` only, so layers that share an activation agree; they are
    stored, never drawn again.

    Args:
        channel_scales: [K] positive, the weight is multiplied and the activation divided by it;
            None for all ones.
    Returns:
        [K] float16 on the CPU.
    Raises:
        TensorError: a quotient is not a normal float16 number.
    """
    generator = torch.Generator().manual_seed(num_inputs)
    drawn = torch.randint(0, 2, (num_inputs,), generator=generator, device="cpu")
    signs = drawn.float() * 2 - 1
    if channel_scales is None:
        input_scales = signs.half()
    else:
        input_scales = (signs / channel_scales.float().cpu()).half()
    check_input_scales(input_scales)
    return input_scales


def row_norms_of(scaled: torch.Tensor, shard: InputShard | None = None) -> torch.Tensor:
    """Root mean square [N] float32 of every whole row of [N, K].

    Summed in float64, so that squares do not overflow. The divisors are tensors: a GPU divides
    exactly by a tensor, but not by a Python number.
    """
    norms: torch.Tensor = torch.linalg.vector_norm(scaled, dim=1, dtype=torch.float64)
    if shard:
        return (shard.add_up(norms.square()) / norms.new_tensor(shard.num_inputs)).sqrt().float()
    return (norms / norms.new_tensor(math.sqrt(scaled.shape[1]))).float()


def to_coordinates(
    weight: torch.Tensor,
    rotation_block_size: int,
    input_scales: torch.Tensor,
    shard: InputShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled, normalized and rotated weight.

    Args:
        weight: [N, K] floating point. input_scales: [K] float16.
        shard: given if ``weight`` has only some of the inputs of its rows.
    Returns:
        coordinates [N, K] float32 of unit variance (zeros for a zero row), and row_norms [N]
        float32.
    """
    scaled = weight.float() / input_scales.to(weight.device).float()
    row_norms = row_norms_of(scaled, shard)
    normalized = scaled / torch.where(row_norms > 0, row_norms, 1)[:, None]
    return rotate(normalized, rotation_block_size), row_norms


def encode_coordinates(coordinates: torch.Tensor, index_bits: int, code: str) -> torch.Tensor:
    """Indices [N, K / 2] int16 of coordinates [N, K] float32, with the least squared error."""
    if code == TRELLIS:
        return trellis.encode(coordinates, index_bits)
    return nearest(coordinates.view(-1, 2), index_bits).view(len(coordinates), -1)


def code_coordinates(coordinates: torch.Tensor, index_bits: int, code: str) -> torch.Tensor:
    """Coordinates [N, K] float32, coded by :func:`encode_coordinates` and decoded again."""
    return decode_indices(encode_coordinates(coordinates, index_bits, code), index_bits, code)


def row_factors(
    coordinates: torch.Tensor,
    coder: Coder,
    shard: InputShard | None = None,
) -> torch.Tensor:
    """Factors [N] float32 by which to raise the norms of rows; 1 for most rows.

    A large weight makes all coordinates of its rotation block large, and at large coordinates there
    are few codewords or none. A raised norm makes the coordinates of its row smaller: the whole row
    gets a little more error and that block much less.

    Args:
        coordinates: [N, K] float32, of unit variance.
        coder: codes coordinates [n, K] and decodes them again.
        shard: as in :func:`to_coordinates`.
    """

    def add_up(sums: torch.Tensor) -> torch.Tensor:
        return shard.add_up(sums) if shard else sums

    num_inputs = shard.num_inputs if shard else coordinates.shape[1]
    fourth_powers = add_up(coordinates.square().square().sum(1, dtype=torch.float64))
    heavy = (fourth_powers > HEAVY_TAIL * num_inputs).nonzero()[:, 0]
    factors = torch.ones_like(coordinates[:, 0])
    if len(heavy):
        rows = coordinates[heavy]
        tried = factors.new_tensor(ROW_FACTORS)
        errors = [
            (factor * coder(rows / factor) - rows).double().square().sum(1) for factor in tried
        ]
        best = add_up(torch.stack(errors)).argmin(0)
        factors[heavy] = tried[best]
    return factors


def forget_tables() -> None:
    """Free the tables that are cached on devices; encoding the next weight makes new ones."""
    grid.cache_clear()
    trellis.classes_of_registers.cache_clear()


def encode_weight(
    weight: torch.Tensor,
    index_bits: int,
    rotation_block_size: int,
    input_scales: torch.Tensor,
    name: str = "weight",
    coder: Coder | None = None,
    weights_at_once: int = ENCODE_CHUNK,
    shard: InputShard | None = None,
    raise_norms: bool = True,
    code: str = PLAIN,
) -> QuantizedWeight:
    """Quantize a weight matrix.

    Args:
        weight: [N, K], floating point, on any device; K a multiple of 64 and of
            ``rotation_block_size``.
        input_scales: [K] float16.
        name: the tensor's name, for errors.
        coder: chooses indices [n, P] int16 for the coordinates [n, K] float32 of some rows; None
            for those of least squared error.
        weights_at_once: how many weights the coder is given at once, in whole rows.
        shard: as in :func:`to_coordinates`.
        raise_norms: whether rows with large weights get the norms of :func:`row_factors`; without,
            norms are root mean squares.
        code: one of CODES.
    Raises:
        TensorError: a value of the weight is NaN or infinite, or overflows when it is scaled.
        ValueError: a shape does not fit.
    """
    if weight.ndim != 2 or input_scales.shape != weight.shape[1:]:
        raise ValueError(
            f"{name}: expected a weight [N, {len(input_scales)}], got shape {tuple(weight.shape)}"
        )
    check_finite(weight, name)
    num_rows, num_inputs = weight.shape
    device = weight.device
    input_scales = input_scales.to(device)
    planes_shape = packed_shape(num_rows, num_inputs, index_bits)
    qweight = torch.empty(planes_shape, dtype=torch.int32, device=device)
    row_norms = torch.empty(num_rows, dtype=torch.float32, device=device)
    most = largest_row_norm(index_bits, code, rotation_block_size, input_scales)
    step = max(1, weights_at_once // num_inputs)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        coordinates, norms = to_coordinates(weight[rows], rotation_block_size, input_scales, shard)
        if raise_norms:
            coder_of_rows = functools.partial(code_coordinates, index_bits=index_bits, code=code)
            factors = row_factors(coordinates, coder_of_rows, shard)
            coordinates, norms = coordinates.div_(factors[:, None]), norms * factors
        if (norms > most).any():
            row = start + int((norms > most).nonzero()[0, 0])
            raise TensorError(
                f"{name}: row {row} divided by its channels' input scales overflows float32"
            )
        row_norms[rows] = norms
        if coder:
            indices = coder(coordinates)
        else:
            indices = encode_coordinates(coordinates, index_bits, code)
        qweight[:, rows] = pack_planes(indices, index_bits)
    return QuantizedWeight(qweight, row_norms, input_scales, rotation_block_size, code)
