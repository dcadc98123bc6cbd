"""The command line: what commands print, how errors are shown, what an interruption keeps."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offline_quantize import commands
from offline_quantize.calibration.text import DEFAULT_TEXT
from offline_quantize.checkpoints.inspect import inspect
from offline_quantize.cli import main, spell_flag
from offline_quantize.errors import Option
from tests.helpers.models import copy_model, tiny_model
from tests.offline.interruptions import counted_writes, error_when_opened


def test_plan(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_llama)
    assert main(["plan", model, "--bpw", "4", "--calibration", "none"]) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in text and "4 bpw, rotation" in text
    assert "result: 1, 2, 4" in text
    assert main(["plan", model, "--bpw", "4.7"]) == 0
    text = capsys.readouterr().out
    assert "mixed rates, rotation" in text and "at 4.700 effective" in text
    assert main(["plan", model, "--processes", "2"]) == 0
    assert " GiB in each of 2 processes, for up to 16384 tokens" in capsys.readouterr().out
    assert main(["plan", model, "--bpw", "4", "--calibration", "none", "--quantize-lm-head"]) == 0
    assert ", and the head at 6" in capsys.readouterr().out
    assert main(["plan", model, "--calibration", str(tmp_path / "absent.txt")]) == 2
    assert "absent.txt: No such file" in capsys.readouterr().err
    assert main(["plan", model, "--calibration", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err
    assert main(["plan", model, "--bpw", "4.7", "--rates", "uniform"]) == 2
    error = capsys.readouterr().err
    assert "--bpw 4.7: uniform rates must be multiples" in error and "--rates mixed" in error


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["torch"] == torch.__version__
    assert rows["vLLM plugin"] == "qamw_vllm:register"
    assert rows["transformers"] == transformers.__version__


def test_standard_output_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["env"]) == 0


def test_a_number_of_processes_that_is_none(
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert main(["quantize", str(tiny_llama), str(tmp_path / "out")]) == 2
    assert "WORLD_SIZE=abc: start the processes with torchrun" in capsys.readouterr().err


def test_what_an_extra_brings_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(commands, "plan", lambda _: fail("filelock"))
    assert main(["plan", str(tmp_path)]) == 2
    assert "qamw: no module filelock; run: pip install '.[quantize]'" in capsys.readouterr().err
    monkeypatch.setattr(commands, "plan", lambda _: fail("offline_quantize.plans"))
    with pytest.raises(ModuleNotFoundError):  # a bug
        main(["plan", str(tmp_path)])


def test_quantize_and_inspect(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(tiny_llama), str(out), "--calibration", "none"]) == 0
    assert f"vllm serve {out} --quantization qamw" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    assert "14 layers" in capsys.readouterr().out
    assert inspect(out).count("\n") == 16
    report = json.loads((out / "qamw_report.json").read_text())
    assert f"{report['effective_bits_per_weight']:.3f} effective bpw" in inspect(out)
    assert main(["quantize", str(tiny_llama), str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["quantize", "no-such/model", str(tmp_path / "x")]) == 2
    assert "the hub answered" in capsys.readouterr().err


def test_a_checkpoint_is_signed_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited = copy_model(Path(__file__).parents[1] / "golden" / "quantized", tmp_path / "edited")
    (edited / "README.md").write_text("edited")
    assert main(["verify", str(edited)]) == 2
    assert "if you changed files on purpose, qamw verify writes a new" in capsys.readouterr().err
    assert main(["verify", "--sign", str(edited)]) == 0
    assert "README.md: 6 bytes, qamw_manifest.json says" in capsys.readouterr().out
    assert main(["verify", str(edited)]) == 0


def test_directories_that_are_no_checkpoint(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_llama)]) == 2
    message = "no qamw_manifest.json, this is not a QAM-W checkpoint"
    assert message in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "absent: not a directory" in capsys.readouterr().err


def test_tokens_without_an_embedding_are_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model(tmp_path / "model", "llama", vocab_size=300))
    options = ["--text", str(DEFAULT_TEXT), "--windows", "1", "--convention", "llama.cpp-512"]
    assert main(["eval", model, "--reference", model, *options]) == 2
    message = r"produces token id 3\d\d from the text, but vocab_size in config.json is 300"
    assert re.search(message, capsys.readouterr().err)


def test_module_can_be_run() -> None:
    command = [sys.executable, "-m", "offline_quantize", "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "option, flag",
    [
        (Option("bpw", 7), "--bpw 7"),
        (Option("bpw", 3.0), "--bpw 3"),
        (Option("calibration", None), "--calibration none"),
        (Option("calibration", Path("my text.txt")), "--calibration 'my text.txt'"),
        (Option("calibration_tokens"), "--calibration-tokens"),
        (Option("resume", True), "--resume"),
        (Option("ignore", ["*.q_proj", "k"]), "--ignore '*.q_proj' --ignore k"),
        (Option("convention", ("lm-eval",)), "--convention lm-eval"),
    ],
    ids=str,
)
def test_parameters_are_spelled_as_flags(option: Option, flag: str) -> None:
    assert spell_flag(option) == flag


@pytest.mark.parametrize("arguments", [["--debug", "verify"], ["verify", "--debug"], ["verify"]])
def test_debug_shows_where_an_error_comes_from(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert "qamw: " in error
    assert ("Traceback" in error) == ("--debug" in arguments)


@pytest.mark.parametrize("bug", [ValueError("a bug"), KeyError("a bug")], ids=repr)
def test_a_bug_keeps_its_traceback(bug: Exception, tmp_path: Path, tiny_llama: Path) -> None:
    arguments: list[Any] = ["quantize", tiny_llama, tmp_path / "out", "--calibration", "none"]
    with counted_writes(tmp_path, kill_at=1, error=bug), pytest.raises(type(bug), match="a bug"):
        main([str(argument) for argument in arguments])


def test_resume_is_offered_once_something_was_written(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(tiny_llama), str(out), "--calibration", "none"]
    with error_when_opened(tiny_llama / "config.json", KeyboardInterrupt()):
        assert main(arguments) == 130
    assert "interrupted; nothing is kept" in capsys.readouterr().err
    # Progress, first shard, progress, second shard
    with counted_writes(out, kill_at=3, error=KeyboardInterrupt()):
        assert main(arguments) == 130
    assert "interrupted; --resume continues after 1 finished shards" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0


def test_a_path_with_spaces_is_quoted_and_control_characters_are_shown(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with space\x1b[31m"
    assert main(["quantize", str(tiny_llama), str(out), "--calibration", "none"]) == 0
    printed = capsys.readouterr().out
    assert f"vllm serve '{tmp_path}/with space\\x1b[31m' --quantization" in printed
    assert "\x1b" not in printed
    assert main(["verify", str(tmp_path / "\x1b\udcff")]) == 2
    assert "\\x1b\\udcff: not a directory" in capsys.readouterr().err


def test_too_little_memory_is_one_line(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(tiny_llama), str(tmp_path / "out"), "--calibration", "none"]
    with counted_writes(tmp_path, kill_at=1, error=MemoryError()):
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "not enough memory, the run needs about" in error and "--resume continues" in error
    with error_when_opened(tiny_llama / "config.json", MemoryError()):
        assert main(["plan", str(tiny_llama)]) == 2
    assert "qamw: not enough memory" in capsys.readouterr().err
