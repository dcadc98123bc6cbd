"""Compiling every kernel that a model will need before it serves. Needs triton."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.ops.crossover import gemm_max_tokens
from qamw_kernels.ops.gluon import decode_launch, narrow_launch, wide_launch
from qamw_kernels.ops.launcher import ON_DEVICE, Launcher
from qamw_kernels.ops.routing import sort_slots
from qamw_kernels.ops.tiling import tiled_shape
from qamw_kernels.ops.triton import launch, rotate_launch
from qamw_kernels.ops.weight import Rate, TiledWeight, entry_words


@dataclass(frozen=True)
class _Warmer:
    """Launches kernels with the smallest weights: kernels are not specialized on sizes."""

    dtype: torch.dtype
    device: torch.device
    launcher: Launcher

    def packed(self, rate: Rate, rotation_block_size: int, num_tokens: int) -> None:
        weight = self._weight(rate, rotation_block_size)
        launch.multiply_packed(self._tokens(weight, num_tokens), weight, None, self.launcher)

    def many_rotated(self, rate: Rate, rotation_block_size: int) -> None:
        """The rotation of more tokens than :meth:`packed` has, with the smallest weights."""
        weight = self._weight(rate, rotation_block_size)
        x = self._tokens(weight, rotate_launch.MANY_INPUTS // weight.num_inputs + 1)
        rotate_launch.rotate(
            x, weight.input_scales, rotation_block_size, self.launcher, swapped=True
        )

    def sums(self, rate: Rate, rotation_block_size: int) -> None:
        """The kernel that adds up shared row blocks, which the smallest weights do not have."""
        weight = self._weight(rate, rotation_block_size)
        y = torch.empty(1, 1, dtype=self.dtype, device=self.device)
        processor = self.launcher.processor(self.device)
        assert processor is not None
        tokens = wide_launch.tokens_of(1)
        shape = wide_launch.shape_of(rate, tokens, processor.shared_memory)
        room = (1, 1, 2, tokens * shape.rows)
        sums = torch.empty(room, dtype=torch.float32, device=self.device)
        wide_launch.add_sums(sums, tokens, shape, weight, None, y, self.launcher)

    def dequantized(self, rate: Rate, rotation_block_size: int) -> None:
        """Without the vendor's GEMM, which would keep a workspace for each of the threads."""
        launch.dequantize(self._weight(rate, rotation_block_size), self.dtype, self.launcher)

    def routed(self, rate: Rate, rotation_block_size: int, block_size: int) -> None:
        weight = self._weight(rate, rotation_block_size)
        expert = weight._replace(tiles=weight.tiles[None], row_norms=weight.row_norms[None])
        chosen = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
        routing = sort_slots(chosen, block_size, 1)
        launch.routed_linear(self._tokens(weight, 1), expert, routing, 1, self.launcher)

    def rotated_and_sorted(self, rate: Rate, rotation_block_size: int) -> None:
        weight = self._weight(rate, rotation_block_size)
        chosen = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
        x, routing = self._tokens(weight, 1), sort_slots(chosen, 1, 1)
        rotate_launch.rotate_sorted(x, weight, routing, 1, self.launcher)

    def combined(self) -> None:
        """For numbers of rows that are multiples of 16, and for others."""
        for num_rows in (16, 17):
            y = torch.zeros(1, num_rows, dtype=self.dtype, device=self.device)
            shares = torch.zeros(1, 1, dtype=torch.float32, device=self.device)
            launch.combine(y, shares, self.launcher)

    def _weight(self, rate: Rate, rotation_block_size: int) -> TiledWeight:
        """One row of the fewest inputs that the rotation allows."""
        num_inputs, device = max(rotation_block_size, UNIT_INPUTS), self.device
        shape = tiled_shape(1, num_inputs, rate.index_bits)
        return TiledWeight(
            tiles=torch.zeros(shape, dtype=torch.int32, device=device),
            row_norms=torch.ones(1, dtype=torch.float32, device=device),
            input_scales=torch.ones(num_inputs, dtype=torch.float16, device=device),
            entry_words=entry_words(rate.index_bits, rate.code, device),
            rotation_block_size=rotation_block_size,
        )

    def _tokens(self, weight: TiledWeight, num_tokens: int) -> torch.Tensor:
        return torch.zeros(num_tokens, weight.num_inputs, dtype=self.dtype, device=self.device)


def packed_tokens(most: int) -> list[int]:
    """Numbers of tokens, up to ``most``, that together need all variants of the packed products.

    A lower ``most`` is raised to one more than the narrow kernel takes: that kernel does not take
    very many inputs, so that another one may run even for few tokens.
    """
    most = max(most, narrow_launch.MAX_TOKENS + 1)
    steps = {launch.SKINNY_MAX_TOKENS, *(8 * parts for parts in decode_launch.PARTS)}
    steps |= {narrow_launch.MAX_TOKENS, *wide_launch.TILES}
    return sorted({min(tokens, most) for tokens in steps})


def warm_up(
    rates: Collection[Rate],
    rotation_block_sizes: Collection[int],
    dtype: torch.dtype,
    device: torch.device,
    experts: bool = False,
    launcher: Launcher = ON_DEVICE,
) -> None:
    """Compile all that the ops launch for weights of these rates and rotations, of any size.

    Call it before a CUDA graph is captured. Compilers run in parallel, one thread each; their
    output stays in Triton's cache on disk.

    Args:
        rates: of the model's layers.
        rotation_block_sizes: of the model's layers.
        dtype: of the activations.
        experts: whether some layers are mixtures of experts.
        launcher: what launches; a test passes one that notes what would be compiled.
    """
    warmer = _Warmer(dtype, device, launcher)
    processor, least = launcher.processor(device), min(rotation_block_sizes)
    few = {rate: packed_tokens(gemm_max_tokens(device, dtype, rate, processor)) for rate in rates}
    # One after the other, and first: all jobs below need these rotations.
    for size in rotation_block_sizes:
        for num_tokens in {min(few[min(rates)]), max(few[min(rates)])}:
            warmer.packed(min(rates), size, num_tokens)
    if wide_launch.fits(1, UNIT_INPUTS, dtype, min(rates), processor):
        warmer.sums(min(rates), least)
        for size in rotation_block_sizes:
            warmer.many_rotated(min(rates), size)
            if experts:
                warmer.rotated_and_sorted(min(rates), size)
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(warmer.packed, rate, least, m) for rate in rates for m in few[rate]]
        for rate in rates:
            for size in rotation_block_sizes:
                jobs.append(pool.submit(warmer.dequantized, rate, size))
        if experts:
            jobs.append(pool.submit(warmer.combined))
            for rate in rates:
                for block_size in launch.routed_block_sizes(dtype, rate, processor):
                    jobs.append(pool.submit(warmer.routed, rate, least, block_size))
        for job in jobs:
            job.result()
