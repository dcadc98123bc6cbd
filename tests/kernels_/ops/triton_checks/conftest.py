"""What every check of a kernel runs under."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty returns NaN, followed by more NaN.

    So a test sees an element that no program writes, and a write past the end.
    """
    empty, guards = torch.empty, []

    def nan_empty(
        *shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu", **kwargs: Any
    ) -> torch.Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if kwargs or not dtype.is_floating_point:
            return empty(shape, dtype=dtype, device=device, **kwargs)
        size = math.prod(shape)
        buffer = empty(size + (1 << 16), dtype=dtype, device=device).fill_(math.nan)
        guards.append(buffer[size:])
        return buffer[:size].view(shape)

    monkeypatch.setattr(torch, "empty", nan_empty)
    yield
    assert all(guard.isnan().all() for guard in guards), "written past the end"
