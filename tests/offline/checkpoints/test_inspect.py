"""What ``inspect`` shows."""

from pathlib import Path

import pytest

from offline_quantize.checkpoints.inspect import inspect
from offline_quantize.errors import QuantizeError
from offline_quantize.files import REPORT
from tests.helpers.models import copy_model


def test_layers_with_and_without_a_report(tmp_path: Path, calibrated: Path) -> None:
    with_report = inspect(calibrated).split("\n")
    assert len(with_report) == 1 + 14 + 1  # header, layers, totals
    first = with_report[1].split()
    assert first[0] == "model.layers.0.mlp.down_proj" and len(first) == 8
    assert with_report[-1].startswith("14 layers, ")
    copy = copy_model(calibrated, tmp_path / "copy")
    (copy / REPORT).write_text('{"layers": 3}')
    with pytest.raises(QuantizeError, match=f"{REPORT}: layers must be an array of objects"):
        inspect(copy)
    (copy / REPORT).write_text('{"layers": [{"name": "x", "sqnr_db": "30"}]}')
    with pytest.raises(QuantizeError, match=f"{REPORT}: sqnr_db of x must be a number, got '30'"):
        inspect(copy)
    (copy / REPORT).unlink()
    without = inspect(copy).split("\n")
    assert without[-1] == with_report[-1]
    assert without[1].split() == first[:-2]  # no SQNR, no output error
