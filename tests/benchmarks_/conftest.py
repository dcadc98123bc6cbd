"""What the tests of the study share."""

import pytest
import torch


@pytest.fixture
def weight() -> torch.Tensor:
    """[8, 150] float32, with rows of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 150, generator=generator) * torch.logspace(-2, 1, 8)[:, None]
