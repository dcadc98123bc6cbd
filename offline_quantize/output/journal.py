"""What an unfinished run remembers of itself, beside its shards.

The file has a checksum: a resumed run uses all of it or nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from offline_quantize.errors import Option, QuantizeError, shortened
from offline_quantize.files import PROGRESS, STATE
from offline_quantize.model.sources import SourceFile
from qamw_kernels.errors import FileError
from qamw_kernels.files import Stamp, open_regular, read_json
from qamw_kernels.format.manifest import FileEntry

HASHED = "sha256:"
SHOWN = 80  # characters of a value in a message


@dataclass
class Journal:
    """The progress of one run.

    Attributes:
        request: all that decides the output's bytes, name -> value. Names that are identifiers are
            those of parameters; for a large value there is its hash, after HASHED.
        sources: the model's files, by path inside its directory.
        state: entry of the file with what was measured; None where nothing was.
        files: everything finished so far, by path inside the output directory.
        notes: JSON that was stored with each finished shard, by file name.
    """

    request: Mapping[str, str]
    sources: Mapping[str, SourceFile] = field(default_factory=dict)
    state: FileEntry | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        content = {
            "request": self.request,
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "state": self.state and self.state.to_dict(),
            "files": {name: entry.to_dict() for name, entry in self.files.items()},
            "notes": self.notes,
        }
        return {"sha256": _checksum(content), **content}

    @staticmethod
    def read(directory: Path) -> "Journal":
        """The journal in an output directory.

        Raises:
            QuantizeError: it is damaged, or of another version of this package.
        """
        path = directory / PROGRESS
        try:
            content = read_json(path)
            if content.pop("sha256", None) != _checksum(content):
                raise FileError(f"{path}: its content does not match the checksum in it")
            return Journal(
                dict(content["request"]),
                {name: _source_file(source) for name, source in content["sources"].items()},
                content["state"] and _entry(content["state"]),
                {name: _entry(entry) for name, entry in content["files"].items()},
                content["notes"],
            )
        except (FileError, KeyError, TypeError, AttributeError) as error:
            raise QuantizeError(
                f"{error}: the run cannot continue from this file; start again in a new directory"
                if isinstance(error, FileError)
                else f"{path}: written by another version of qamw; start again in a new directory"
            ) from None

    def require(self, directory: Path, request: Mapping[str, str]) -> None:
        """Refuse to go on with another request than the one that the run was started with.

        Args:
            directory: of the output, for the message.
        Raises:
            QuantizeError: they differ; says in what.
        """
        if self.request == request:
            return
        known = self.request.keys() & request.keys()
        changed = [name for name in sorted(known) if self.request[name] != request[name]]
        # Where plain values differ, hashes differ because of them: only the values are named.
        values = [name for name in changed if not request[name].startswith(HASHED)]
        message: list[str | Option] = [f"{directory}: started from another request"]
        for i, name in enumerate(values or changed):
            message += [", " if i else ": ", Option(name) if name.isidentifier() else name]
            old, new = (shortened(of[name], SHOWN) for of in (self.request, request))
            message.append(f" was {old} and is {new}" if values else " is not the same")
        message.append("; use the same request as the first run, or start again in a new directory")
        raise QuantizeError(*message)

    def read_state(self, directory: Path) -> dict[str, torch.Tensor] | None:
        """What was measured.

        Returns:
            Tensors by name; empty where nothing was measured; None where they were lost.
        """
        if self.state is None:
            return {}
        try:
            with open_regular(directory / STATE) as file:
                content = file.read(self.state.num_bytes + 1)
        except FileError:
            return None
        if FileEntry(hashlib.sha256(content).hexdigest(), len(content)) != self.state:
            return None
        return load(content)


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _source_file(source: Mapping[str, Any]) -> SourceFile:
    return SourceFile(Stamp(**source["stamp"]), source["sha256"])


def _entry(entry: Mapping[str, Any]) -> FileEntry:
    return FileEntry(entry["sha256"], entry["bytes"])
