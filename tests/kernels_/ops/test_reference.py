"""The plain-torch implementations of the ops, which CPU tensors run, against the codec."""

import pytest
import torch

from qamw_kernels.codec.decode import decode_coordinates, decode_weight, linear_reference
from qamw_kernels.codec.rotation import rotate
from qamw_kernels.format.codebook import CODES, INDEX_BITS
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.linear import combine, linear, routed_linear
from qamw_kernels.ops.routing import sort_slots
from qamw_kernels.ops.weight import TiledWeight
from tests.helpers.weights import random_weight

pytestmark = pytest.mark.skipif(interpreted(), reason="CPU tensors run the Triton kernels")

N, K, B = 44, 192, 64  # 4,224 pairs: every codeword occurs


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_the_cpu_op_is_the_codec(index_bits: int, code: str) -> None:
    weight = random_weight(N, K, index_bits, B, code=code)
    tiled = TiledWeight.of(weight)
    x, bias = torch.randn(2, 3, K), torch.randn(N)
    torch.testing.assert_close(linear(x, tiled), linear_reference(x, weight))
    torch.testing.assert_close(linear(x, tiled, bias), linear_reference(x, weight, bias))
    # Rotated back: one input after the other.
    identity = linear(rotate(torch.eye(K), B) / weight.input_scales, tiled)
    torch.testing.assert_close(identity.T / weight.row_norms[:, None], decode_coordinates(weight))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("parallel", [False, True])
def test_the_routed_cpu_op_is_the_codec(parallel: bool, code: str) -> None:
    weights = [random_weight(N, K, 9, B, seed, code=code) for seed in range(4)]
    for weight in weights:
        weight.input_scales.copy_(weights[0].input_scales)
    chosen = torch.tensor([[2, 0], [2, 3], [0, 3], [3, 2], [0, 2]])
    here = [1, 3] if parallel else [0, 1, 2, 3]
    expert_map = torch.tensor([-1, 0, -1, 1], dtype=torch.int32) if parallel else None
    routing = sort_slots(chosen, 4, 4, expert_map)
    tiled = TiledWeight.of_experts([weights[e] for e in here])
    for x in (torch.randn(5, K), torch.randn(10, K)):  # of every token, or of every slot
        y = routed_linear(x, tiled, routing, 10)
        for slot, expert in enumerate(chosen.flatten().tolist()):
            expected = torch.zeros(N)
            if expert in here:
                expected = decode_weight(weights[expert]) @ x[slot * len(x) // 10]
            torch.testing.assert_close(y[slot], expected, rtol=1e-4, atol=1e-4)


def test_combine_adds_up_the_slots_of_a_token() -> None:
    y, shares = torch.randn(6, N), torch.rand(2, 3)
    expected = torch.stack([y[3 * i : 3 * i + 3].T @ shares[i] for i in range(2)])
    torch.testing.assert_close(combine(y, shares), expected)
    assert combine(y[:0], shares[:0]).shape == (0, N)


@pytest.mark.parametrize(
    "y, shares, message",
    [
        (torch.zeros(5, 4), torch.zeros(2, 3), r"y: expected shape \(6, 4\), got \(5, 4\)"),
        (
            torch.zeros(6, 4),
            torch.zeros(6),
            r"shares: .* \[M, k\] with k > 0, got \(6,\)",
        ),
        (torch.zeros(6, 4), torch.zeros(2, 3).half(), "shares: expected dtype torch.float32"),
        (torch.zeros(6), torch.zeros(2, 3), r"y: expected shape \[M \* k, N\], got \(6,\)"),
    ],
)
def test_what_combine_refuses(y: torch.Tensor, shares: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(y, shares)
