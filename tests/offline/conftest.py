"""A quantized checkpoint in several shards."""

from pathlib import Path

import pytest

from offline_quantize.pipeline import quantize
from tests.helpers.checkpoints import LITTLE_CALIBRATION


@pytest.fixture(scope="session")
def calibrated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_llama`` quantized with calibration; treat it as read-only."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    quantize(tiny_llama, out, LITTLE_CALIBRATION)
    return out
