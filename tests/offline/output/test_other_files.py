"""Files that are copied along: what is refused before any work."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.output.other_files import check_copies
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.models import copy_model


def test_names_that_could_not_be_written(tmp_path: Path, tiny_llama: Path) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    plan = make_plan(model, QuantizeRequest(calibration=None))
    check_copies(plan, tmp_path / "out")
    (model / ("x" * 255)).touch()
    check_copies(plan, tmp_path / "out")
    with pytest.raises(QuantizeError, match="xxx: a name too long for the disk of"):
        check_copies(plan, tmp_path / Path(*["y" * 200] * 19))
    (model / "README.md").mkdir()
    check_copies(plan, tmp_path / "out")
    (model / "README.md" / "file").touch()
    with pytest.raises(QuantizeError, match=r"model/README.md: a folder with the name of a file"):
        check_copies(plan, tmp_path / "out")


def test_names_that_the_result_has_itself(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy_model(tiny_llama, tmp_path / "model")
    for name in ("qamw_report.json", "README.base-model.md"):
        (model / name).write_text("old")
    request = QuantizeRequest(calibration=None)
    quantize(model, tmp_path / "one", request)
    assert [r.getMessage() for r in caplog.records] == [
        f"{model / 'qamw_report.json'} is not copied: a file of the result has this name"
    ]
    assert (tmp_path / "one" / "README.base-model.md").read_text() == "old"
    (model / "README.md").write_text("the model's card")
    quantize(model, tmp_path / "two", request)
    assert f"{model / 'README.base-model.md'} is not copied" in caplog.text
    assert (tmp_path / "two" / "README.base-model.md").read_text() == "the model's card"


def test_modules_behind_the_model_are_copied_and_verified(tmp_path: Path, tiny_llama: Path) -> None:
    """vLLM finds the dense layers of sentence-transformers by modules.json."""
    model = copy_model(tiny_llama, tmp_path / "model")
    (model / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (model / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, model / "2_Dense" / "model.safetensors")
    quantize(model, tmp_path / "out", QuantizeRequest(calibration=None))
    assert verify(tmp_path / "out")
    dequantize(tmp_path / "out", tmp_path / "plain", torch.bfloat16)
    for directory in ("out", "plain"):
        assert load_file(tmp_path / directory / "2_Dense" / "model.safetensors").keys()
