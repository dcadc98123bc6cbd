"""The files of a checkpoint directory against its manifest, byte for byte."""

from pathlib import Path

from offline_quantize.files import can_be_listed
from qamw_kernels.errors import FileError
from qamw_kernels.files import open_regular, sha256_of
from qamw_kernels.format.manifest import MANIFEST, Manifest

# Of git and of the hub's client. No reader of models looks there, as long as no index names it.
_NOT_LISTED = frozenset({MANIFEST, ".gitattributes", ".gitignore"})
_NOT_ENTERED = frozenset({".git", ".cache/huggingface"})


def find_files(directory: Path) -> tuple[set[str], list[str]]:
    """Walk through a directory.

    Returns:
        Paths inside it of the files that a manifest must list; and a line for everything that
        cannot be listed, or that only some readers would take for a part of the model.
    """
    found, faults, folders = set(), [], [directory]
    while folders:  # not by recursion: folders can be as deep as somebody likes
        for path in sorted(folders.pop().iterdir()):
            name = path.relative_to(directory).as_posix()
            if path.is_dir():
                if path.is_symlink():
                    faults.append(f"{path}: a link to a folder, expected the folder itself")
                elif name not in _NOT_ENTERED:
                    folders.append(path)
            elif fault := _fault(path, name):
                faults.append(fault)
            elif name not in _NOT_LISTED:
                found.add(name)
    return found, faults


def _fault(path: Path, name: str) -> str:
    """What is wrong with a file itself, whatever its bytes are; empty where nothing is."""
    if not can_be_listed(name):
        return f"{str(path)!r}: a name that some operating systems do not allow"
    if name not in _NOT_LISTED and any(part.startswith(".") for part in name.split("/")):
        return f"{path}: a hidden file, expected none in a checkpoint"
    try:
        open_regular(path).close()
    except FileError as error:
        return str(error)
    return ""


def differences(directory: Path, manifest: Manifest, found: set[str]) -> list[str]:
    """A line for every file that is not what the manifest says.

    Args:
        found: of :func:`find_files`.
    """
    faults = []
    for name, entry in manifest.files.items():
        path = directory / name
        if name not in found:
            faults.append(f"{path}: missing")
        elif fault := entry.size_fault(path) or entry.digest_fault(sha256_of(path)):
            faults.append(f"{path}: {fault}")
    unlisted = sorted(found - set(manifest.files))
    return faults + [f"{directory / name}: not in {MANIFEST}" for name in unlisted]
