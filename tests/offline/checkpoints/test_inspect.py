"""What ``inspect`` shows."""

from pathlib import Path

import pytest

from offline_quantize.checkpoints.inspect import inspect
from offline_quantize.errors import QuantizeError
from offline_quantize.files import REPORT
from qamw_kernels.errors import QamwError
from tests.helpers.checkpoints import change_quantization_config
from tests.helpers.models import copy_model

GOLDEN = Path(__file__).parents[2] / "golden" / "quantized"


def test_layers_with_and_without_a_report(tmp_path: Path, calibrated: Path) -> None:
    with_report = inspect(calibrated).split("\n")
    assert len(with_report) == 1 + 14 + 2  # header, layers, totals, what was not checked
    first = with_report[1].split()
    assert first[0] == "model.layers.0.mlp.down_proj" and len(first) == 8
    assert with_report[-2].startswith("14 layers, ")
    assert "qamw verify also checks bytes and values" in with_report[-1]
    copy = copy_model(calibrated, tmp_path / "copy")
    (copy / REPORT).unlink()
    without = inspect(copy).split("\n")
    assert without[-2:] == with_report[-2:]
    assert without[1].split() == first[:-2]  # no SQNR, no output error


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("", "Expecting value"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "layers must be an array, got NoneType"),
        ('{"layers": 3}', "layers must be an array, got int"),
        ('{"layers": [3]}', r"layers\[0\] must be an object with a unique name"),
        ('{"layers": [{"name": ["x"]}]}', r"layers\[0\] must be an object with a unique name"),
        ('{"layers": [{"name": "x"}, {"name": "x"}]}', r"layers\[1\] .* a unique name"),
        *(
            (f'{{"layers": [{{"name": "x", "sqnr_db": {value}}}]}}', "sqnr_db of x must be a numb")
            for value in ('"30"', "true", "NaN", "1e999", "1" + 400 * "0", "[1]", "{}")
        ),
        (
            '{"layers": [{"name": "\\u001b[2J", "output_nmse": []}]}',
            r"'\\x1b\[2J' must be a number",
        ),
    ],
)
def test_a_damaged_report_is_refused(report: str, message: str, tmp_path: Path) -> None:
    copy = copy_model(GOLDEN, tmp_path / "copy")
    (copy / REPORT).write_text(report)
    with pytest.raises(QamwError, match=f"{REPORT}: .*{message}"):
        inspect(copy)


def test_a_layer_of_the_ignore_list_is_refused(tmp_path: Path) -> None:
    copy = copy_model(GOLDEN, tmp_path / "copy")
    change_quantization_config(copy, ignore=["model.layers.0.mlp.up_proj"])
    with pytest.raises(
        QuantizeError, match=r"up_proj\.qweight is quantized, but config\.json's ignore"
    ):
        inspect(copy)
