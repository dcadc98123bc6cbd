"""Products in bfloat16 on a CPU without instructions for them."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from offline_quantize.model import products
from offline_quantize.model.products import quick_products

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)


def tensor(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().requires_grad_()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight, bias)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias, q, k.mT) + torch.bmm(q, k.mT)


CASES = {
    "linear": (linear, (tensor(2, 30, 64), tensor(96, 64), tensor(96))),
    "attention": (attention, (tensor(1, 4, 40, 32), tensor(1, 4, 40, 32), tensor(1, 4, 40, 32))),
    "products of batches": (scores, (tensor(3, 20, 64), tensor(3, 25, 64), tensor(3, 20, 25))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_torch(
    case: tuple[Any, tuple[torch.Tensor, ...]],
) -> None:
    """But for the last bit of a few: they are rounded once, from sums in another order."""
    function, inputs = case
    inputs = tuple(x.detach().requires_grad_() for x in inputs)

    def run() -> tuple[torch.Tensor, ...]:
        output = function(*inputs)
        return output, *torch.autograd.grad(output.float().square().sum(), inputs)

    expected = run()
    with quick_products(CPU) as active:
        found = run()
    assert isinstance(active, TorchDispatchMode)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 2**-8


def test_other_dtypes_and_cpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 70, dtype=torch.float64)
    with quick_products(CPU):
        assert torch.equal(x @ x.T, (x @ x.T))
        assert (x.half() @ x.half().T).dtype == torch.float16
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    assert not isinstance(quick_products(CPU), TorchDispatchMode)
