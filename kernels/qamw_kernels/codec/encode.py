"""The codec in plain torch, on any device: one weight matrix to three tensors and back.

    U = rotate(W / input_scales / row_norms)      coordinates of unit variance or less, nearly Gaussian
    indices = nearest codeword of each pair (U[n, 2p], U[n, 2p + 1])
    W^ = row_norms * unrotate(codebook[indices]) * input_scales

``input_scales`` [K] holds rotation signs and activation-aware factors in one vector, rotation_signs / channel_scales.
All layers that read the same activation share it, so the activation is scaled and rotated once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qamw_kernels.format.codebook import load_codebook
from qamw_kernels.codec.nearest import nearest
from qamw_kernels.format.packing import pack_planes, packed_shape, unpack_planes
from qamw_kernels.codec.rotation import rotate, unrotate

ENCODE_CHUNK = 1 << 18  # weights encoded at once: bounds the temporaries and keeps them in cache
HEAVY_TAIL = 4.0  # kurtosis of a row's coordinates; of a Gaussian, for which the codebooks are made, it is 3
ROW_FACTORS = (1, 1.15, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 6)


@dataclass
class QuantizedWeight:
    """One quantised weight matrix, as stored.

    Attributes:
        qweight: [index_bits, N, K / 64] int32, see :mod:`qamw_kernels.packing`.
        row_norms: [N] float32, not negative; 0 for a zero row. Root mean squares of the scaled rows, times :func:`row_factors`.
        input_scales: [K] float16, finite and not zero.
        rotation_block_size: Hadamard width, divides K.
    """

    qweight: torch.Tensor
    row_norms: torch.Tensor
    input_scales: torch.Tensor
    rotation_block_size: int

    @property
    def index_bits(self) -> int:
        return self.qweight.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return len(self.row_norms), len(self.input_scales)

    def rows(self, part: slice) -> "QuantizedWeight":
        """The same weight, some of its rows only."""
        return QuantizedWeight(self.qweight[:, part], self.row_norms[part], self.input_scales, self.rotation_block_size)


def check_input_scales(input_scales: torch.Tensor) -> None:
    """Raise ValueError unless every value is a normal float16 number (finite, not zero, full precision)."""
    magnitude = input_scales.abs()
    normal = magnitude.isfinite() & (magnitude >= torch.finfo(torch.float16).tiny)
    if not normal.all():
        at = int((~normal).nonzero()[0, 0])
        raise ValueError(f"input_scales[{at}] = {float(input_scales[at])}: expected a finite, normal float16 number")


def check_row_norms(row_norms: torch.Tensor) -> None:
    """Raise ValueError unless every value is finite and not negative."""
    wrong = ~(row_norms.isfinite() & (row_norms >= 0))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"row_norms: expected finite values, not negative, got {float(row_norms[row])} in row {row}")


def make_input_scales(num_inputs: int, channel_scales: torch.Tensor | None = None) -> torch.Tensor:
    """Random rotation signs over activation-aware factors: ``rotation_signs / channel_scales``.

    The signs depend on ``num_inputs`` only, so layers that share an activation agree; they are stored, never re-drawn.

    Args:
        channel_scales: [K] positive, the weight is multiplied and the activation divided by it; None for all ones.
    Returns:
        [K] float16 on the CPU.
    """
    generator = torch.Generator().manual_seed(num_inputs)
    signs = torch.randint(0, 2, (num_inputs,), generator=generator).float() * 2 - 1
    input_scales = (signs if channel_scales is None else signs / channel_scales.float().cpu()).half()
    check_input_scales(input_scales)
    return input_scales


@dataclass(frozen=True)
class InputShard:
    """What encoding some of the inputs of whole rows needs to know of the others.

    Attributes:
        num_inputs: of the whole rows.
        add_up: sums a float64 tensor over all shards.
    """

    num_inputs: int
    add_up: Callable[[torch.Tensor], torch.Tensor]


def row_norms_of(scaled: torch.Tensor, shard: InputShard | None = None) -> torch.Tensor:
    """Root mean square [N] float32 of every whole row of [N, K]; summed in float64, so that squares do not overflow."""
    norms = torch.linalg.vector_norm(scaled, dim=1, dtype=torch.float64)
    if shard:
        return (shard.add_up(norms.square()) / shard.num_inputs).sqrt().float()
    return (norms / math.sqrt(scaled.shape[1])).float()


def to_coordinates(weight: torch.Tensor, rotation_block_size: int, input_scales: torch.Tensor,
                   shard: InputShard | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled, normalised and rotated weight.

    Args:
        weight: [N, K] floating point. input_scales: [K] float16.
        shard: where these are not all inputs of the rows.
    Returns:
        coordinates [N, K] float32 of unit variance (zeros for a zero row), and row_norms [N] float32.
    """
    scaled = weight.float() / input_scales.to(weight.device).float()
    row_norms = row_norms_of(scaled, shard)
    return rotate(scaled / torch.where(row_norms > 0, row_norms, 1)[:, None], rotation_block_size), row_norms


def nearest_codewords(coordinates: torch.Tensor, index_bits: int) -> torch.Tensor:
    """What is left of coordinates [..., K] float32 when every pair is coded as the codeword nearest to it."""
    codebook = load_codebook(index_bits).to(coordinates.device)
    return codebook[nearest(coordinates.view(-1, 2), index_bits).int()].view(coordinates.shape)


def row_factors(coordinates: torch.Tensor, code: Callable[[torch.Tensor], torch.Tensor], shard: InputShard | None = None) -> torch.Tensor:
    """By how much to raise the norms of rows: [N] float32, 1 for most.

    Large weights make the coordinates of their rotation block large, and there codewords are few or none. Smaller coordinates
    give the whole row a little more error and that block much less.

    Args:
        coordinates: [N, K] float32, of unit variance.
        code: what coding makes of coordinates [n, K].
    """
    def add_up(sums: torch.Tensor) -> torch.Tensor:
        return shard.add_up(sums) if shard else sums

    fourth_powers = add_up(coordinates.square().square().sum(1, dtype=torch.float64))
    heavy = (fourth_powers > HEAVY_TAIL * (shard.num_inputs if shard else coordinates.shape[1])).nonzero()[:, 0]
    factors = torch.ones_like(coordinates[:, 0])
    if len(heavy):
        rows = coordinates[heavy]
        errors = [(factor * code(rows / factor) - rows).double().square().sum(1) for factor in ROW_FACTORS]
        factors[heavy] = factors.new_tensor(ROW_FACTORS)[add_up(torch.stack(errors)).argmin(0)]
    return factors


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Raise ValueError that names the first value of a weight, of any shape, which is NaN or infinite."""
    if not weight.isfinite().all():
        at = (~weight.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name}{at} is {float(weight[tuple(at)])}: every weight must be finite")


def encode_weight(weight: torch.Tensor, index_bits: int, rotation_block_size: int, input_scales: torch.Tensor, name: str = "weight",
                  coder: Callable[[torch.Tensor], torch.Tensor] | None = None, weights_at_once: int = ENCODE_CHUNK,
                  shard: InputShard | None = None) -> QuantizedWeight:
    """Quantise a weight matrix.

    Args:
        weight: [N, K], floating point, on any device; K a multiple of 64 and of ``rotation_block_size``.
        input_scales: [K] float16.
        name: the tensor's name, for errors.
        coder: chooses indices [n, P] int16 for the coordinates [n, K] float32 of some rows; None for the nearest codewords.
        weights_at_once: how many weights the coder is given at once, in whole rows.
        shard: as in :func:`to_coordinates`.
    Raises:
        ValueError: a value of the weight is NaN or infinite, or a shape does not fit.
    """
    if weight.ndim != 2 or input_scales.shape != weight.shape[1:]:
        raise ValueError(f"{name}: expected a weight [N, {len(input_scales)}], got shape {tuple(weight.shape)}")
    check_finite(weight, name)
    input_scales = input_scales.to(weight.device)
    qweight = torch.empty(packed_shape(len(weight), weight.shape[1], index_bits), dtype=torch.int32, device=weight.device)
    row_norms = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(1, weights_at_once // weight.shape[1])
    for i in range(0, len(weight), step):
        coordinates, norms = to_coordinates(weight[i : i + step], rotation_block_size, input_scales, shard)
        factors = row_factors(coordinates, lambda c: nearest_codewords(c, index_bits), shard)
        coordinates, norms = coordinates.div_(factors[:, None]), norms * factors
        if not norms.isfinite().all():
            row = i + int((~norms.isfinite()).nonzero()[0, 0])
            raise ValueError(f"{name}: row {row} divided by its channels' input scales overflows float32")
        row_norms[i : i + step] = norms
        indices = coder(coordinates) if coder else nearest(coordinates.view(-1, 2), index_bits).view(len(coordinates), -1)
        qweight[:, i : i + step] = pack_planes(indices, index_bits)
    return QuantizedWeight(qweight, row_norms, input_scales, rotation_block_size)


def decode_weight(quantized: QuantizedWeight) -> torch.Tensor:
    """The weight [N, K] float32 that a quantised layer stands for, exactly as the format defines it."""
    codebook = load_codebook(quantized.index_bits).to(quantized.qweight.device)
    indices = unpack_planes(quantized.qweight)  # [N, P]
    coordinates = codebook[indices.int()].flatten(1)  # [N, K]
    weight = unrotate(coordinates, quantized.rotation_block_size)
    return weight.mul_(quantized.row_norms[:, None]).mul_(quantized.input_scales.float())


def linear_reference(x: torch.Tensor, quantized: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Slow truth of the kernels: rotate the activation, multiply with the codewords, scale the rows.

    Args:
        x: [..., K] floating point. bias: [N] or None.
    Returns:
        [..., N] in the dtype of x, accumulated in float32.
    """
    codebook = load_codebook(quantized.index_bits).to(x.device)
    coordinates = codebook[unpack_planes(quantized.qweight).int()].flatten(1)  # [N, K]
    rotated = rotate(x.float() * quantized.input_scales.float(), quantized.rotation_block_size)
    y = rotated @ coordinates.T * quantized.row_norms
    return (y if bias is None else y + bias.float()).to(x.dtype)
