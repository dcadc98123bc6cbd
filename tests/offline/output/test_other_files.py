"""Files that are copied along: what is refused before any work."""

from pathlib import Path

import pytest

from offline_quantize.errors import QuantizeError
from offline_quantize.output.other_files import check_copies
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
