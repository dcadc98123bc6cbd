"""A model and its quantization, in two architectures."""

from pathlib import Path

import pytest

from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.models import tiny_model


# gemma2: BOS before every window, tied head, capped logits
@pytest.fixture(scope="session", params=["llama", "gemma2"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A tiny model with a context of 4096, and its quantization; treat both as read-only."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(folder / "model", request.param, max_position_embeddings=4096)
    quantize(model, folder / "quantized", QuantizeRequest(bpw=3, calibration=None))
    return model, folder / "quantized"
