"""The examples run, as far as no engine is needed; tests/engine has the others."""

from pathlib import Path

import pytest

from examples import quantize_and_evaluate
from tests.helpers.texts import EVALUATION_TEXT


def test_quantize_and_evaluate(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_and_evaluate.main(tiny_llama, EVALUATION_TEXT, tmp_path / "out", rates=(6,))
    (line,) = capsys.readouterr().out.splitlines()
    assert 0 < float(line.split()[-2]) < 0.01
    assert (tmp_path / "out" / "rates.png").stat().st_size > 1000
