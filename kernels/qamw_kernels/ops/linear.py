"""The torch ops ``qamw::linear`` and, for mixtures of experts, ``qamw::routed_linear``.

CUDA tensors run the Triton kernels. CPU tensors run plain torch, the truth; only when the process was started with
Triton's interpreter (``TRITON_INTERPRET=1``) do they run the Triton kernels too. There is no other choice between
implementations, and no falling back from one to the other.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from qamw_kernels.codec import rotation
from qamw_kernels.format.codebook import INDEX_BITS, load_quadrant
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.ops.routing import Routing
from qamw_kernels.ops.tiling import tiled_shape, untile

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as triton reads it
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@functools.lru_cache(maxsize=64)
def quadrant_words(index_bits: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The kernels' copy of a codebook's quadrant, [C / 4] int32: two bfloat16 per word, x in the low half.

    Cached per (index_bits, device): treat it as read-only, and ask for it when a model is loaded, not in a CUDA graph.

    Raises:
        ValueError: ``index_bits`` is not in 6..12.
    """
    return load_quadrant(index_bits).bfloat16().view(torch.int32)[:, 0].to(device)


def linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    bias: torch.Tensor | None,
    rotation_block_size: int,
) -> torch.Tensor:
    """A quantised linear layer: rotate the activation, then multiply it with the codewords.

    No host synchronisation and no shape that depends on data, so it can be compiled and captured in a CUDA graph.

    Args:
        x: [..., K] bfloat16, float16 or float32.
        tiles: [ceil(N / 16), ceil(K / 512), index_bits, 32, 4] int32, of :mod:`qamw_kernels.tiling`.
        row_norms: [N] float32. input_scales: [K] float16.
        quadrant_words: [C / 4] int32, from :func:`quadrant_words`. bias: [N] floating point or None.
    Returns:
        [..., N] in the dtype of x, accumulated in float32.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    y = torch.ops.qamw.linear(x.reshape(-1, x.shape[-1]), tiles, row_norms, input_scales, quadrant_words, bias, rotation_block_size)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def routed_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    routing: Routing,
    num_slots: int,
    rotation_block_size: int,
) -> torch.Tensor:
    """The same for the experts of a layer, each with the tokens that are sent to it.

    Args:
        x: [M, K] bfloat16, float16 or float32; ``num_slots`` is a multiple of M, and slot s reads row s // (num_slots / M).
        tiles: [experts, ...], of each expert as in :func:`linear`. row_norms: [experts, N] float32.
        input_scales: [K] float16, of all experts.
        routing: from :func:`qamw_kernels.routing.sort_slots`, or vLLM's ``moe_align_block_size``.
    Returns:
        [num_slots, N] in the dtype of x; zeros for slots whose expert is not here.
    """
    return torch.ops.qamw.routed_linear(
        x, tiles, row_norms, input_scales, quadrant_words, *routing, num_slots, rotation_block_size)


def _check(name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """``tensor`` has this shape, one of the dtypes, and lies on the device of ``like``."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def _check_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    bias: torch.Tensor | None,
    rotation_block_size: int,
) -> None:
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % UNIT_INPUTS:
        raise ValueError(f"x: expected shape [M, K] with K a positive multiple of {UNIT_INPUTS}, got {tuple(x.shape)}")
    num_inputs = x.shape[1]
    _check("x", x, tiles, tuple(x.shape), *_FLOATS)
    _check("input_scales", input_scales, tiles, (num_inputs,), torch.float16)
    if rotation_block_size not in rotation.ROTATION_BLOCK_SIZES or num_inputs % rotation_block_size:
        raise ValueError(f"rotation_block_size: expected one of {rotation.ROTATION_BLOCK_SIZES} that divides {num_inputs} inputs, "
                         f"got {rotation_block_size}")
    if row_norms.ndim != 1 or not len(row_norms):
        raise ValueError(f"row_norms: expected shape [N], got {tuple(row_norms.shape)}")
    index_bits = tiles.shape[2] if tiles.ndim == 5 else 0
    shape = tiled_shape(len(row_norms), num_inputs, index_bits)
    if index_bits not in INDEX_BITS or tuple(tiles.shape) != shape:
        raise ValueError(f"tiles: expected shape ({shape[0]}, {shape[1]}, {INDEX_BITS.start}..{INDEX_BITS.stop - 1}, 32, 4) for "
                         f"{len(row_norms)} rows and {num_inputs} inputs, got {tuple(tiles.shape)}")
    _check("tiles", tiles, tiles, shape, torch.int32)
    _check("row_norms", row_norms, tiles, (len(row_norms),), torch.float32)
    _check("quadrant_words", quadrant_words, tiles, (2 ** (index_bits - 2),), torch.int32)
    if bias is not None:
        _check("bias", bias, tiles, (len(row_norms),), *_FLOATS)


def _coordinates(tiles: torch.Tensor, quadrant_words: torch.Tensor, num_rows: int, num_inputs: int) -> torch.Tensor:
    """Rotated, normalised weight [N, K] float32: codebook[indices]."""
    quadrant = quadrant_words[:, None].contiguous().view(torch.bfloat16).float()  # [C / 4, 2]
    signs = quadrant.new_tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    codebook = (signs[:, None] * quadrant).reshape(-1, 2)  # [C, 2]
    return codebook[untile(tiles, num_rows, num_inputs).int()].flatten(1)


def _linear_torch(
    x: torch.Tensor,
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    bias: torch.Tensor | None,
    rotation_block_size: int,
) -> torch.Tensor:
    rotated = rotation.rotate(x.float() * input_scales.float(), rotation_block_size)
    y = rotated @ _coordinates(tiles, quadrant_words, len(row_norms), x.shape[1]).T * row_norms
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _check_routed_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    num_sorted: torch.Tensor,
    block_size: int,
    num_slots: int,
    rotation_block_size: int,
) -> None:
    if tiles.ndim != 6 or not len(tiles) or row_norms.ndim != 2 or len(row_norms) != len(tiles):
        raise ValueError(f"tiles and row_norms: expected shapes [experts, ...] and [experts, N], got {tuple(tiles.shape)} and "
                         f"{tuple(row_norms.shape)}")
    _check_linear(x, tiles[0], row_norms[0], input_scales, quadrant_words, None, rotation_block_size)
    num_tokens, num_padded, num_blocks = x.shape[0], slots.shape[0], experts.shape[0]  # len() would make constants of them when compiled
    if num_slots != 0 and (num_tokens == 0 or num_slots % num_tokens):
        raise ValueError(f"num_slots: expected a multiple of {num_tokens} tokens, got {num_slots}")
    if num_padded > num_blocks * block_size:
        raise ValueError(f"experts: expected one for every {block_size} of {num_padded} slots, got {num_blocks}")
    for name, tensor, length in (("slots", slots, num_padded), ("experts", experts, num_blocks), ("num_sorted", num_sorted, 1)):
        _check(name, tensor, tiles, (length,), torch.int32)


def _routed_linear_torch(
    x: torch.Tensor,
    tiles: torch.Tensor,
    row_norms: torch.Tensor,
    input_scales: torch.Tensor,
    quadrant_words: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    num_sorted: torch.Tensor,
    block_size: int,
    num_slots: int,
    rotation_block_size: int,
) -> torch.Tensor:
    y = x.new_zeros(num_slots, row_norms.shape[1])
    blocks = slots[: int(num_sorted)].view(-1, block_size)
    for own, expert in zip(blocks.long(), experts.tolist(), strict=False):
        own = own[own < num_slots]
        if expert >= 0:
            tokens = x[own // (num_slots // len(x))]
            y[own] = _linear_torch(tokens, tiles[expert], row_norms[expert], input_scales, quadrant_words, None, rotation_block_size)
    return y


def _routed_linear_fake(x: torch.Tensor, tiles: torch.Tensor, row_norms: torch.Tensor, input_scales: torch.Tensor,
                        quadrant_words: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, num_sorted: torch.Tensor,
                        block_size: int, num_slots: int, rotation_block_size: int) -> torch.Tensor:
    return x.new_empty(num_slots, row_norms.shape[1])


def _linear_fake(x: torch.Tensor, tiles: torch.Tensor, row_norms: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], row_norms.shape[0])


def _linear_triton(*args: Any) -> torch.Tensor:
    from qamw_kernels import triton_launch  # triton is imported at the first launch

    return triton_launch.linear(*args)


def _routed_linear_triton(*args: Any) -> torch.Tensor:
    from qamw_kernels.ops.triton import launch as triton_launch

    return triton_launch.routed_linear(*args)


def _after(check: Callable[..., None], implementation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*args: Any) -> torch.Tensor:
        check(*args)
        return implementation(*args)

    return run


def _register() -> torch.library.Library:
    library = torch.library.Library("qamw", "DEF")
    weight = "Tensor x, Tensor tiles, Tensor row_norms, Tensor input_scales, Tensor quadrant_words"
    for name, others, check, triton, plain, fake in (
        ("linear", "Tensor? bias", _check_linear, _linear_triton, _linear_torch, _linear_fake),
        ("routed_linear", "Tensor slots, Tensor experts, Tensor num_sorted, int block_size, SymInt num_slots",
         _check_routed_linear, _routed_linear_triton, _routed_linear_torch, _routed_linear_fake),
    ):
        library.define(f"{name}({weight}, {others}, int rotation_block_size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _after(check, triton), "CUDA")
        library.impl(name, _after(check, triton if INTERPRETED else plain), "CPU")
        torch.library.register_fake(f"qamw::{name}", _after(check, fake), lib=library)
    return library


# Kept alive for the life of the process. A module that is imported again (reload) finds the op and leaves it alone:
# a second definition of the same op is an error in torch.
if not hasattr(torch.ops.qamw, "linear"):
    _library = _register()
