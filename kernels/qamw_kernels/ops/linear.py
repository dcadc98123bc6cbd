"""The torch ops ``qamw::linear`` and, of mixtures of experts, ``routed_linear`` and ``combine``.

CUDA tensors run the Triton kernels. CPU tensors run :mod:`qamw_kernels.ops.reference`; only in a
process that was started with Triton's interpreter (``TRITON_INTERPRET=1``) do they run the Triton
kernels too. Nothing else selects an implementation, and none falls back to the other.
"""

from collections.abc import Callable
from typing import Any

import torch

from qamw_kernels.format.codebook import CODES, INDEX_BITS, entry_bits
from qamw_kernels.format.config import ROTATION_BLOCK_SIZES
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.ops import reference
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.routing import Routing
from qamw_kernels.ops.tiling import tiled_shape
from qamw_kernels.ops.weight import TiledWeight

Linear = Callable[[torch.Tensor, TiledWeight, torch.Tensor | None], torch.Tensor]
RoutedLinear = Callable[[torch.Tensor, TiledWeight, Routing, int], torch.Tensor]
Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHT = "Tensor x, Tensor tiles, Tensor row_norms, Tensor input_scales, Tensor entry_words"
_ROUTING = "Tensor slots, Tensor experts, Tensor num_sorted, int block_size, SymInt num_slots"
_LINEAR = f"linear({_WEIGHT}, Tensor? bias, int rotation_block_size) -> Tensor"
_ROUTED_LINEAR = f"routed_linear({_WEIGHT}, {_ROUTING}, int rotation_block_size) -> Tensor"
_COMBINE = "combine(Tensor y, Tensor shares) -> Tensor"


def linear(
    x: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A quantized linear layer: rotate the activation, then multiply it with the codewords.

    The host waits for nothing and no shape depends on data, so it can be compiled and captured in a
    CUDA graph.

    Args:
        x: [..., K] bfloat16, float16 or float32.
        weight: [N, K], on the device of x.
        bias: [N] floating point or None.
    Returns:
        [..., N] in the dtype of x, accumulated in float32.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    y: torch.Tensor = torch.ops.qamw.linear(
        x.reshape(-1, x.shape[-1]),
        weight.tiles,
        weight.row_norms,
        weight.input_scales,
        weight.entry_words,
        bias,
        weight.rotation_block_size,
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def routed_linear(
    x: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    num_slots: int,
) -> torch.Tensor:
    """:func:`linear` for the experts of a layer, each with the tokens that are sent to it.

    Args:
        x: [M, K] bfloat16, float16 or float32; ``num_slots`` is a multiple of M, and slot s reads
            row s // (num_slots / M).
        weight: of all experts of the layer that are on this rank.
        routing: from :func:`qamw_kernels.ops.routing.sort_slots`, or vLLM's
            ``moe_align_block_size``.
    Returns:
        [num_slots, N] in the dtype of x; zeros for slots whose expert is not here.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    y: torch.Tensor = torch.ops.qamw.routed_linear(
        x,
        weight.tiles,
        weight.row_norms,
        weight.input_scales,
        weight.entry_words,
        *routing,
        num_slots,
        weight.rotation_block_size,
    )
    return y


def combine(y: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """For every token, the weighted sum over its slots, added up in float32 one after the other.

    Args:
        y: [M * k, N] bfloat16, float16 or float32: the slots of token 0, then those of token 1.
        shares: [M, k] float32, the weight of each slot.
    Returns:
        [M, N] in the dtype of y.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    out: torch.Tensor = torch.ops.qamw.combine(y, shares)
    return out


def _check(
    name: str,
    tensor: torch.Tensor,
    like: torch.Tensor,
    shape: tuple[int, ...],
    *dtypes: torch.dtype,
) -> None:
    """``tensor`` has this shape, one of the dtypes, and lies on the device of ``like``."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: expected dtype {expected}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def _check_linear(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> None:
    tiles, row_norms, input_scales, entry_words, rotation_block_size = weight
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % UNIT_INPUTS:
        raise ValueError(
            f"x: expected shape [M, K] with K a positive multiple of {UNIT_INPUTS}, "
            f"got {tuple(x.shape)}"
        )
    num_inputs = x.shape[1]
    _check("x", x, tiles, tuple(x.shape), *_FLOATS)
    _check("input_scales", input_scales, tiles, (num_inputs,), torch.float16)
    if rotation_block_size not in ROTATION_BLOCK_SIZES or num_inputs % rotation_block_size:
        raise ValueError(
            f"rotation_block_size: expected one of {ROTATION_BLOCK_SIZES} that divides "
            f"{num_inputs} inputs, got {rotation_block_size}"
        )
    if row_norms.ndim != 1 or not len(row_norms):
        raise ValueError(f"row_norms: expected shape [N], got {tuple(row_norms.shape)}")
    num_rows = len(row_norms)
    index_bits = tiles.shape[2] if tiles.ndim == 5 else 0
    shape = tiled_shape(num_rows, num_inputs, index_bits)
    if index_bits not in INDEX_BITS or tuple(tiles.shape) != shape:
        raise ValueError(
            f"tiles: expected shape ({shape[0]}, {shape[1]}, "
            f"{INDEX_BITS.start}..{INDEX_BITS.stop - 1}, 32, 4) for {num_rows} rows and "
            f"{num_inputs} inputs, got {tuple(tiles.shape)}"
        )
    _check("tiles", tiles, tiles, shape, torch.int32)
    _check("row_norms", row_norms, tiles, (num_rows,), torch.float32)
    expected = [(1 << entry_bits(index_bits, code),) for code in CODES]
    if tuple(entry_words.shape) not in expected:
        raise ValueError(
            f"entry_words: expected shape {expected[0]} or {expected[1]}, "
            f"got {tuple(entry_words.shape)}"
        )
    _check("entry_words", entry_words, tiles, tuple(entry_words.shape), torch.int32)
    if bias is not None:
        _check("bias", bias, tiles, (num_rows,), *_FLOATS)


def _check_routed_linear(
    x: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    num_slots: int,
) -> None:
    tiles, row_norms = weight.tiles, weight.row_norms
    if tiles.ndim != 6 or not len(tiles) or row_norms.ndim != 2 or len(row_norms) != len(tiles):
        raise ValueError(
            "tiles and row_norms: expected shapes [experts, ...] and [experts, N], got "
            f"{tuple(tiles.shape)} and {tuple(row_norms.shape)}"
        )
    _check_linear(x, weight.expert(0), None)
    slots, experts, num_sorted, block_size = routing
    # not len(), which torch.compile would turn into constants
    num_tokens, num_padded, num_blocks = x.shape[0], slots.shape[0], experts.shape[0]
    if num_slots != 0 and (num_tokens == 0 or num_slots % num_tokens):
        raise ValueError(f"num_slots: expected a multiple of {num_tokens} tokens, got {num_slots}")
    if num_padded > num_blocks * block_size:
        raise ValueError(
            f"experts: expected one for every {block_size} of {num_padded} slots, got {num_blocks}"
        )
    _check("slots", slots, tiles, (num_padded,), torch.int32)
    _check("experts", experts, tiles, (num_blocks,), torch.int32)
    _check("num_sorted", num_sorted, tiles, (1,), torch.int32)


def _check_combine(y: torch.Tensor, shares: torch.Tensor) -> None:
    if shares.ndim != 2 or shares.shape[1] == 0:
        raise ValueError(f"shares: expected shape [M, k] with k > 0, got {tuple(shares.shape)}")
    _check("shares", shares, y, tuple(shares.shape), torch.float32)
    if y.ndim != 2:
        raise ValueError(f"y: expected shape [M * k, N], got {tuple(y.shape)}")
    _check("y", y, y, (shares.shape[0] * shares.shape[1], y.shape[1]), *_FLOATS)


def _linear_fake(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.row_norms.shape[0])


def _linear_triton(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    from qamw_kernels.ops.triton import launch  # Triton is imported at the first launch

    return launch.linear(x, weight, bias)


def _linear_cpu(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return (_linear_triton if interpreted() else reference.linear)(x, weight, bias)


def _routed_linear_fake(
    x: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    num_slots: int,
) -> torch.Tensor:
    return x.new_empty(num_slots, weight.row_norms.shape[1])


def _routed_linear_triton(
    x: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    num_slots: int,
) -> torch.Tensor:
    from qamw_kernels.ops.triton import launch

    return launch.routed_linear(x, weight, routing, num_slots)


def _routed_linear_cpu(
    x: torch.Tensor,
    weight: TiledWeight,
    routing: Routing,
    num_slots: int,
) -> torch.Tensor:
    implementation = _routed_linear_triton if interpreted() else reference.routed_linear
    return implementation(x, weight, routing, num_slots)


def _combine_fake(y: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    return y.new_empty(shares.shape[0], y.shape[1])


def _combine_triton(y: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    from qamw_kernels.ops.triton import launch

    return launch.combine(y, shares)


def _combine_cpu(y: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    return (_combine_triton if interpreted() else reference.combine)(y, shares)


def _linear_op(implementation: Linear) -> Callable[..., torch.Tensor]:
    """``implementation`` with the arguments of the op's schema, checked."""

    def op(
        x: torch.Tensor,
        tiles: torch.Tensor,
        row_norms: torch.Tensor,
        input_scales: torch.Tensor,
        entry_words: torch.Tensor,
        bias: torch.Tensor | None,
        rotation_block_size: int,
    ) -> torch.Tensor:
        weight = TiledWeight(tiles, row_norms, input_scales, entry_words, rotation_block_size)
        _check_linear(x, weight, bias)
        return implementation(x, weight, bias)

    return op


def _routed_linear_op(implementation: RoutedLinear) -> Callable[..., torch.Tensor]:
    """``implementation`` with the arguments of the op's schema, checked."""

    def op(
        x: torch.Tensor,
        tiles: torch.Tensor,
        row_norms: torch.Tensor,
        input_scales: torch.Tensor,
        entry_words: torch.Tensor,
        slots: torch.Tensor,
        experts: torch.Tensor,
        num_sorted: torch.Tensor,
        block_size: int,
        num_slots: int,
        rotation_block_size: int,
    ) -> torch.Tensor:
        weight = TiledWeight(tiles, row_norms, input_scales, entry_words, rotation_block_size)
        routing = Routing(slots, experts, num_sorted, block_size)
        _check_routed_linear(x, weight, routing, num_slots)
        return implementation(x, weight, routing, num_slots)

    return op


def _combine_op(implementation: Combine) -> Combine:
    """``implementation`` with its arguments checked."""

    def op(y: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        _check_combine(y, shares)
        return implementation(y, shares)

    return op


def _register() -> Any:
    """Define the ops; the library that holds them must be kept alive."""
    library: Any = torch.library.Library("qamw", "DEF")  # type: ignore[no-untyped-call]  # no types
    for schema in (_LINEAR, _ROUTED_LINEAR, _COMBINE):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("linear", _linear_op(_linear_triton), "CUDA")
    library.impl("linear", _linear_op(_linear_cpu), "CPU")
    torch.library.register_fake("qamw::linear", _linear_op(_linear_fake), lib=library)
    library.impl("routed_linear", _routed_linear_op(_routed_linear_triton), "CUDA")
    library.impl("routed_linear", _routed_linear_op(_routed_linear_cpu), "CPU")
    fake = _routed_linear_op(_routed_linear_fake)
    torch.library.register_fake("qamw::routed_linear", fake, lib=library)
    library.impl("combine", _combine_op(_combine_triton), "CUDA")
    library.impl("combine", _combine_op(_combine_cpu), "CPU")
    torch.library.register_fake("qamw::combine", _combine_op(_combine_fake), lib=library)
    return library


# Kept alive for the life of the process. A module that is imported again (reload) finds the op and
# leaves it alone: a second definition of the same op is an error in torch.
if not hasattr(torch.ops.qamw, "linear"):
    _library = _register()
