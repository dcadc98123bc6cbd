"""Whether a checkpoint matches its manifest: what ``qamw verify`` refuses is not served.

vLLM reads whatever the files hold. A flipped bit of an index, two tensors of one shape that were
exchanged, another ``rotation_block_sizes`` in config.json: all of that loads, but gives a different
model. So every file that is read when a model is served must have the size and SHA-256 that the
quantizer recorded.

Documentation is not compared: people edit the model card of a published checkpoint, and remove
plots, without changing the model. In a directory of the hub's cache, files other than weights may
be missing, because vLLM downloads only what it needs.
"""

import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vllm import envs
from vllm.logger import init_logger

from qamw_kernels.errors import FileError, first_few
from qamw_kernels.files import read_json
from qamw_kernels.format.index import CONFIG, INDEX, read_index
from qamw_kernels.format.manifest import MANIFEST, FileEntry, Manifest
from qamw_vllm.loading.digests import Digests, remembered_digests

logger = init_logger(f"vllm.{__name__}")

VERIFY_VARIABLE = "QAMW_VERIFY"

_WEIGHTS = ".safetensors"
# What vLLM and transformers look for by themselves: configs, chat templates, tokenizers, weights.
_FOUND_BY_READERS = (".json", ".jinja", ".model", _WEIGHTS)
_DOCUMENTATION = re.compile(
    r"(^|/)(\.[^/]+|[^/]+\.(md|png|jpe?g|gif|svg|pdf)|(licen[cs]e|notice)[^/]*|qamw_report\.json)$",
    re.IGNORECASE,
)
_FAULTS_SHOWN = 8


@dataclass(frozen=True)
class Checked:
    """What was compared with a manifest, and found equal.

    Attributes:
        num_hashed: files whose bytes were read; the digests of the others were cached.
        seconds: that the comparison took.
    """

    num_files: int
    num_bytes: int
    num_hashed: int
    seconds: float

    def __str__(self) -> str:
        how = f"{self.seconds:.1f} s" if self.num_hashed else "checked before"
        return (
            f"{self.num_files} files, {self.num_bytes / 1e9:.2f} GB: they match {MANIFEST} ({how})"
        )


def verification_is_on() -> bool:
    """Whether checkpoints are checked; a warning says so if they are not."""
    if os.environ.get(VERIFY_VARIABLE) != "0":
        return True
    logger.warning_once(
        "QAM-W: %s=0, so nothing is compared with %s, and weights that a checkpoint lacks may go "
        "unnoticed",
        VERIFY_VARIABLE,
        MANIFEST,
    )
    return False


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights; a model with random weights needs none."""
    return any(directory.glob(f"*{_WEIGHTS}"))


def check_config(directory: Path) -> None:
    """Refuse a config.json with duplicate keys, of which vLLM would silently take one.

    Raises:
        FileError: it is not a JSON object in which every key occurs once.
    """
    if (path := directory / CONFIG).exists():
        read_json(path)


def check_checkpoint(directory: Path, cache: Path | None = None) -> Checked:
    """Compare all files that serving reads with the manifest.

    Args:
        directory: of a QAM-W checkpoint.
        cache: a folder for digests that were computed before; None for one in vLLM's cache.
    Raises:
        FileError: there is no manifest; or files are missing, differ, or are read although the
            manifest does not list them, and the first few are named; or see :func:`check_config`.
        FormatError: the manifest or the index cannot be understood.
    """
    start = time.perf_counter()
    if not (directory / MANIFEST).is_file():
        raise FileError(
            f"{directory}: no {MANIFEST}, so changes since the quantization cannot be noticed. "
            f"{_way_out(directory)}"
        )
    listed = Manifest.read(directory).files
    served = {file: entry for file, entry in listed.items() if not _DOCUMENTATION.search(file)}
    if directory.parent.name == "snapshots":  # in the hub's cache
        served = {
            file: entry
            for file, entry in served.items()
            if file.endswith(_WEIGHTS) or (directory / file).exists()
        }
    faults = [
        *(
            f"{file}: {fault}"
            for file, entry in served.items()
            if (fault := entry.size_fault(directory / file))
        ),
        *(f"{file}: not in {MANIFEST}" for file in _read_files(directory) if file not in listed),
    ]
    _refuse(directory, faults)  # before anything is hashed: it takes no time
    cache = cache or Path(envs.VLLM_CACHE_ROOT) / "qamw"
    with remembered_digests(cache, directory) as digests:
        faults = _digest_faults(directory, served, digests)
    _refuse(directory, faults or _index_faults(directory, listed))
    check_config(directory)
    num_bytes = sum(entry.num_bytes for entry in served.values())
    return Checked(len(served), num_bytes, digests.num_hashed, time.perf_counter() - start)


def _digest_faults(directory: Path, served: dict[str, FileEntry], digests: Digests) -> list[str]:
    found = zip(served.items(), digests.of(directory, list(served)), strict=True)
    return [
        f"{file}: {fault}"
        for (file, entry), digest in found
        if (fault := entry.digest_fault(digest))
    ]


def _read_files(directory: Path) -> list[str]:
    """Files that readers look for by themselves, so that every manifest must list them."""
    paths = (p for p in directory.rglob("*") if p.suffix in _FOUND_BY_READERS and not p.is_dir())
    found = (path.relative_to(directory) for path in paths)
    shown = (p for p in found if not any(part.startswith(".") for part in p.parts[:-1]))
    return sorted(
        path.as_posix()
        for path in shown
        if path.suffix == _WEIGHTS or not _DOCUMENTATION.search(path.as_posix())
        if path.name != MANIFEST
    )


def _index_faults(directory: Path, listed: Collection[str]) -> list[str]:
    """Shards that the index names and the manifest does not list."""
    if not (directory / INDEX).exists():
        return []
    shards = sorted(set(read_index(directory).values()))
    return [f"{INDEX}: {file} is not in {MANIFEST}" for file in shards if file not in listed]


def _refuse(directory: Path, faults: list[str]) -> None:
    if not faults:
        return
    lines = first_few(faults, _FAULTS_SHOWN, "\n  ")
    raise FileError(
        f"{directory}: changed since it was quantized:\n  {lines}\n{_way_out(directory)}"
    )


def _way_out(directory: Path) -> str:
    return (
        f"If you trust it: 'qamw verify --sign {directory}' checks it and writes a new {MANIFEST}, "
        f"or {VERIFY_VARIABLE}=0 serves it unchecked"
    )
