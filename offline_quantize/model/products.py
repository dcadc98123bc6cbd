"""Products of bfloat16 matrices on CPUs that have no instructions for them.

On these, torch multiplies element by element: the pass forwards takes 5 times as long as in
float32, and the pass backwards 90 times (an EPYC with AVX2, one core). The product of the same
numbers in float32, rounded once, is the same except for the order of summation.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.baddbmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    }
)


class _InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types
    """While active, bfloat16 products on the CPU, also of gradients, are computed in float32."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in _PRODUCTS or not _is_slow(args[0]):
            return func(*args, **(kwargs or {}))
        wide = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
        return tree_map(torch.Tensor.bfloat16, func(*wide, **(kwargs or {})))


def _is_slow(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16 that torch uses."""
    # Without oneDNN there is no such function.
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def quick_products(device: torch.device) -> AbstractContextManager[object]:
    """While active, products on ``device`` take hardly longer in bfloat16 than in float32."""
    slow = device.type == "cpu" and not has_bfloat16()
    return _InFloat32() if slow else nullcontext()  # type: ignore[no-untyped-call]
