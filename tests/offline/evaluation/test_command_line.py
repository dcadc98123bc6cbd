"""``qamw eval``: what it prints and writes, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offline_quantize.cli import main
from offline_quantize.commands import write_report
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.models import copy_model, tiny_model
from tests.offline.evaluation.texts import RAW


def test_command_line(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    report, plot = tmp_path / "eval.json", tmp_path / "eval.png"
    text.write_text(RAW, encoding="utf-8")
    quantize(tiny_llama, out, QuantizeRequest(bpw=5.5, calibration=None))
    arguments = ["eval", str(out), str(tiny_llama), "--reference", str(tiny_llama)]
    arguments += ["--text", str(text), "--convention", "llama.cpp-512", "--windows", "3"]
    arguments += ["--noise-windows", "1", "--json", str(report), "--plot", str(plot)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    change = r"[+-]\d+\.\d{3} % ± \d\.\d{3}\n"
    assert re.search(rf"llama\.cpp-512 +3 +765 +\d+\.\d{{4}} +\d+\.\d{{4}}  {change}", printed)
    assert "noise floor" in printed and "BOS: none" in printed
    figures = json.loads(report.read_text())
    assert figures["command"] == ["qamw", *arguments]
    settings = [figures[key] for key in ("engine", "dtype", "bos", "kl_convention")]
    assert settings == ["transformers", "bfloat16", "none", "llama.cpp-512"]
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["text"]["file"] == str(text)
    quantized, plain = figures["checkpoints"]
    assert (quantized["kl"]["num_windows"], quantized["kl"]["num_tokens"]) == (3, 765)
    assert quantized["kl"]["mean"] > plain["kl"]["mean"] == 0
    assert plain["effective_bits_per_weight"] is None
    assert 5.5 < quantized["effective_bits_per_weight"] < 5.8
    assert figures["bfloat16_noise_floor"]["num_windows"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["eval.json", "eval.png", "out", "text.txt"]  # nothing half-written
    arguments[arguments.index(str(report))] = str(plot)
    assert main(arguments) == 2
    assert f"--json and --plot are both {plot}" in capsys.readouterr().err
    arguments[arguments.index(str(plot))] = "/dev/full"
    assert main(arguments) == 2
    printed, error = capsys.readouterr()
    assert "noise floor" in printed and "/dev/full: No space left" in error


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What ``qamw eval`` prints when it refuses."""
    assert main(["eval", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_bad_text_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none, short, binary = tmp_path / "none.txt", tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("Too short.\n")
    binary.write_bytes(b"\xff\xfe\x00")
    usual = [tiny_llama, "--reference", tiny_llama, "--text"]
    assert re.search(rf"{none}: .*No such file", refused(capsys, *usual, none))
    assert re.search(rf"{binary}: .*can't decode byte 0xff", refused(capsys, *usual, binary))
    too_short = r"too short for one window of gptq-2048: it has \d+ tokens"
    assert re.search(too_short, refused(capsys, *usual, short))
    assert "--text: the text is empty" in refused(capsys, *usual, os.devnull)


def test_bad_options_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(RAW, encoding="utf-8")
    usual = [tiny_llama, "--reference", tiny_llama, "--text", text]
    too_long = (
        "gptq-2048 needs 2047 tokens of context, but the context of the model is 512: "
        "choose another --convention"
    )
    assert too_long in refused(capsys, *usual)
    assert "none is not a directory" in refused(
        capsys, *usual, "--json", tmp_path / "none" / "x.json"
    )
    assert f"{tmp_path}: is a directory" in refused(capsys, *usual, "--json", tmp_path)


def test_checkpoints_that_do_not_fit_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(RAW, encoding="utf-8")
    usual = ["--reference", tiny_llama, "--text", text, "--convention", "llama.cpp-512"]
    usual += ["--windows", 1, "--noise-windows", 0]
    larger = tiny_model(tmp_path / "larger", "llama", vocab_size=512)
    assert re.search(
        r"larger/config\.json: vocab_size is 512, expected \d+ as in",
        refused(capsys, larger, *usual),
    )
    foreign = copy_model(tiny_llama, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (foreign / "config.json").write_text(json.dumps(config))
    expected = "foreign/config.json: quant_method is 'gptq', but in transformers only qamw, plain"
    message = refused(capsys, foreign, *usual)
    assert expected in message and "with --engine vllm" in message
    other = copy_model(tiny_llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"{other}: its tokenizer splits the text into other tokens" in refused(
        capsys, other, *usual
    )
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    assert f"{other}: no usable tokenizer" in refused(capsys, other, *usual)


def test_figures_are_saved_before_they_are_shown(tmp_path: Path, tiny_llama: Path) -> None:
    """A terminal that cannot show them must not cost them; nor does one that knows no ±."""
    text, report = tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text(RAW, encoding="utf-8")
    command = [sys.executable, "-m", "offline_quantize", "eval", tiny_llama]
    command += ["--reference", tiny_llama, "--text", text, "--convention", "llama.cpp-512"]
    command += ["--windows", "2", "--noise-windows", "0", "--json", report]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, capture_output=True)
    assert done.returncode == 0 and b"standard error" in done.stdout, done.stderr
    report.unlink()
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL).returncode == 2
    assert json.loads(report.read_text())["checkpoints"]


def test_reports_go_through_links_and_pipes(tmp_path: Path) -> None:
    """Replacing /dev/null, as root, would do away with it."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_report(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"content"
    reading, writing = os.pipe()
    write_report(Path(f"/dev/fd/{writing}"), b"content")
    assert os.read(reading, 100) == b"content"
    os.close(reading)
    os.close(writing)
