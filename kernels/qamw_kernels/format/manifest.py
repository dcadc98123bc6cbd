"""qamw_manifest.json: size and SHA-256 of every file of a checkpoint, see docs/format.md."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qamw_kernels.errors import FormatError
from qamw_kernels.files import is_inside, read_json, sha256_of

MANIFEST = "qamw_manifest.json"
MANIFEST_VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """What a manifest knows of one file.

    Attributes:
        sha256: of its bytes, in hexadecimal.
        num_bytes: its size.
    """

    sha256: str
    num_bytes: int

    @staticmethod
    def of(path: Path) -> "FileEntry":
        """The entry of a file as it is now.

        Raises:
            FileError: no regular file that can be read.
        """
        return FileEntry(sha256_of(path), path.stat().st_size)

    def size_fault(self, path: Path) -> str:
        """How a file differs, as far as can be seen without reading it; empty if it does not.

        Like that of :meth:`digest_fault`, the text ends a message that begins with the file's name.
        """
        if not path.exists():
            return "missing"
        size = path.stat().st_size
        return "" if size == self.num_bytes else f"{size} bytes, {MANIFEST} says {self.num_bytes}"

    def digest_fault(self, sha256: str) -> str:
        """How ``sha256``, of the bytes of a file, differs from the recorded one; empty if not."""
        return "" if sha256 == self.sha256 else f"SHA-256 {sha256}, {MANIFEST} says {self.sha256}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of an entry."""
        return {"sha256": self.sha256, "bytes": self.num_bytes}


@dataclass(frozen=True)
class Manifest:
    """A validated manifest.

    Attributes:
        files: path inside the directory -> entry, of every file but the manifest itself.
        sources: the same for the shards and config.json of the model that was quantized; empty if
            they were not recorded.
    """

    files: Mapping[str, FileEntry]
    sources: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        content: dict[str, Any] = {"manifest_version": MANIFEST_VERSION}
        content["files"] = {name: self.files[name].to_dict() for name in sorted(self.files)}
        if self.sources:
            content["sources"] = {n: self.sources[n].to_dict() for n in sorted(self.sources)}
        return content

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """Read and validate the manifest of a checkpoint directory.

        Raises:
            FileError: there is none, or it is no JSON object.
            FormatError: another version, an unknown key, or an entry that no file can have.
        """
        path = directory / MANIFEST
        content = read_json(path)
        version = content.get("manifest_version")
        if type(version) is not int or version != MANIFEST_VERSION:
            raise FormatError(
                f"{path}: manifest_version {version!r} is not supported, "
                f"this version of qamw reads {MANIFEST_VERSION}"
            )
        if unknown := sorted(set(content) - {"manifest_version", "files", "sources"}):
            raise FormatError(f"{path}: unknown keys {unknown}")
        files = _entries(path, "files", content.get("files"))
        return Manifest(files, _entries(path, "sources", content.get("sources", {})))


def _entries(path: Path, key: str, entries: Any) -> dict[str, FileEntry]:
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: {key} must be a JSON object, got {type(entries).__name__}")
    return {name: _entry(path, name, entry) for name, entry in entries.items()}


def _entry(path: Path, name: str, entry: Any) -> FileEntry:
    if not is_inside(name):
        raise FormatError(f"{path}: {name!r} is not the path of a file inside the directory")
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
        raise FormatError(f"{path}: {name} must have bytes and sha256 and nothing else")
    size, digest = entry["bytes"], entry["sha256"]
    if type(size) is not int or size < 0:
        raise FormatError(f"{path}: bytes of {name} must be an integer, got {size!r}")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise FormatError(f"{path}: sha256 of {name} must be 64 hexadecimal digits, got {digest!r}")
    return FileEntry(digest, size)
