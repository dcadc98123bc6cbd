"""Decoder layers that are run without weights."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offline_quantize.model.tracing import LayerCall, trace_layer


class Layer(nn.Module):
    """It has a buffer with values, so that nothing of it can be traced on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, device="meta")
        self.register_buffer("factors", torch.ones(4))

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.linear(hidden) * self.factors, None


def test_what_meta_tensors_cannot_do_is_done_on_the_cpu() -> None:
    """Wherever the hidden states are: they may be on a GPU before any layer is."""
    layer = Layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = LayerCall(torch.empty(1, 2, 4, device="cuda"), (), {})
        traced = trace_layer(layer, call)
    assert traced.inputs == [["linear"]]
    assert len(traced.output) == 2 and traced.output[0].device.type == "cpu"
    assert layer.linear.weight.is_meta
