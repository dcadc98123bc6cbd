"""The doors through which a checkpoint comes in: each takes a directory and hands something out."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.checkpoints.inspect import inspect
from offline_quantize.checkpoints.verify import verify
from offline_quantize.pipeline import quantize
from tools.attack.models import REQUEST
from tools.attack.reading import digest, read_content
from tools.attack.serving import served
from tools.attack.verdicts import Delivered

Door = Callable[[Path], Delivered]


def through_verify(directory: Path) -> Delivered:
    """What ``qamw verify`` calls sound is what is in the files."""
    verify(directory)
    return _content(directory)


def through_inspect(directory: Path) -> Delivered:
    """The table of ``qamw inspect``, line by line.

    It does not compare bytes and says so: a table that is not that of the original is right as long
    as it is what the headers and config.json say.
    """
    lines = inspect(directory).splitlines()
    assert "qamw verify also checks" in lines[-1]
    content = read_content(directory)
    quantization = content.config["quantization_config"]
    delivered = {}
    for name, tensor in content.tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            inputs = tensor.shape[2] * 64
            block = quantization["rotation_block_sizes"][str(inputs)]
            bits = tensor.shape[0] / 2
            (words,) = (line.split() for line in lines if line.startswith(f"{module} "))
            told = "".join(words[1:-4]), words[-5], words[-3]
            shown = f"{tensor.shape[1]}x{inputs}", f"{bits:g}", str(block)
            delivered[module] = "as stored" if told == shown else f"{told}, stored {shown}"
    return delivered


def through_dequantize(directory: Path) -> Delivered:
    """The plain model that ``qamw dequantize`` writes."""
    return _written(lambda out: dequantize(directory, out, torch.float32))


def through_plugin(directory: Path) -> Delivered:
    """The model that vLLM holds once it has loaded the directory."""
    return served(directory)


def through_quantize(directory: Path) -> Delivered:
    """What ``qamw quantize --calibration none`` writes; ``qamw verify`` must accept it."""

    def write(out: Path) -> None:
        quantize(directory, out, REQUEST)
        verify(out)

    return _written(write)


DOORS: dict[str, Door] = {
    "verify": through_verify,
    "inspect": through_inspect,
    "dequantize": through_dequantize,
    "plugin": through_plugin,
}
"""Of quantized checkpoints."""

SOURCE_DOORS: dict[str, Door] = {"quantize": through_quantize}
"""Of plain ones."""


def _written(write: Callable[[Path], object]) -> Delivered:
    folder = Path(tempfile.mkdtemp(prefix="qamw-attack-out-"))
    try:
        write(folder / "out")
        return _content(folder / "out")
    finally:
        shutil.rmtree(folder)


def _content(directory: Path) -> Delivered:
    content = read_content(directory)
    return digest(content.tensors, {"config.json": json.dumps(content.config, sort_keys=True)})
