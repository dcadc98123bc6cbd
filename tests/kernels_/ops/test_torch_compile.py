"""torch.compile takes the ops as they are: one graph for every number of tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qamw_kernels.format.weight import QuantizedWeight
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.linear import linear, routed_linear
from qamw_kernels.ops.routing import Routing, sort_slots
from qamw_kernels.ops.weight import TiledWeight
from tests.helpers.weights import random_weight

pytestmark = pytest.mark.skipif(interpreted(), reason="CPU tensors run the Triton kernels")

N, K, B = 20, 192, 64
Layer = Callable[..., torch.Tensor]


def compile_linear(
    weight: QuantizedWeight, bias: torch.Tensor | None, backend: Any
) -> tuple[Layer, Layer]:
    """A compiled linear layer followed by an addition, and the same uncompiled."""
    tiled = TiledWeight.of(weight)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return 1 + linear(x, tiled, bias)

    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, dynamic=True, backend=backend), layer


def test_fullgraph_without_recompiling_for_other_numbers_of_tokens() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Layer:
        graphs.append(graph)
        return graph.forward

    compiled, layer = compile_linear(random_weight(N, K, 11, B), torch.randn(N), backend)
    for num_tokens in (5, 2, 33):
        x = torch.randn(num_tokens, K)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if "qamw" in str(node.target)]
    assert called == ["qamw.linear"]  # opaque to the compiler


def test_routed_without_recompiling_for_other_numbers_of_tokens() -> None:
    graphs: list[torch.fx.GraphModule] = []
    weight = TiledWeight.of_experts([random_weight(N, K, 8, B)])

    def backend(graph: torch.fx.GraphModule, _: object) -> Layer:
        graphs.append(graph)
        return graph.forward

    def layer(
        x: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, num_sorted: torch.Tensor
    ) -> torch.Tensor:
        return routed_linear(x, weight, Routing(slots, experts, num_sorted, 16), x.shape[0])

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    # The first makes no size that a weight has too: the compiler would take them for the same.
    for num_tokens in (140, 70, 33):
        x = torch.randn(num_tokens, K)
        routing = sort_slots(torch.zeros(num_tokens, 1, dtype=torch.int32), 16, 1)
        assert torch.equal(compiled(x, *routing[:3]), layer(x, *routing[:3]))
    assert len(graphs) == 1


def test_compile_aot() -> None:
    compiled, layer = compile_linear(random_weight(N, K, 8, B), None, "aot_eager")
    x = torch.randn(5, K)
    assert torch.equal(compiled(x), layer(x))
