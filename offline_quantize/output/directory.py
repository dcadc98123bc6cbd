"""The output directory: every file is written whole or not at all, config.json last.

A progress file remembers finished shards and the request, so that a resumed run goes on only with
the very same request and ends in the very same bytes. Without config.json nothing can mistake a
partial directory for a checkpoint.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offline_quantize.errors import Option, QuantizeError
from offline_quantize.files import CONFIG, LOCK, PROGRESS, STATE, check_finished, json_bytes
from offline_quantize.output.journal import Journal
from offline_quantize.output.lock import locked
from qamw_kernels.errors import TensorError
from qamw_kernels.files import leftovers, sync, write_atomically
from qamw_kernels.format.index import INDEX
from qamw_kernels.format.manifest import MANIFEST, FileEntry, Manifest

logger = logging.getLogger(__name__)


class Output:
    """One output directory being written, while it is held with :meth:`reserved`.

    Attributes:
        directory: where.
        journal: what is finished so far.
    """

    def __init__(
        self,
        directory: Path,
        journal: Journal,
        state: Mapping[str, torch.Tensor] | None = None,
        unfinished: Journal | None = None,
        resumable: bool = True,
    ) -> None:
        """Begin a run, or continue one with the files that are finished.

        Args:
            directory: must exist.
            journal: of this run: its request and sources.
            state: what was measured, and is kept until the run is finished.
            unfinished: the journal of the run that this one continues, with the same request.
            resumable: whether a run can go on after an error, for messages.
        """
        self.directory = directory
        self.journal = journal
        self._resumable = resumable
        if state:
            path = self._commit(STATE, lambda path: save_file(dict(state), path))
            journal.state = FileEntry.of(path)
        if unfinished:
            self._take_up(unfinished)
        self._save_journal()

    @staticmethod
    @contextmanager
    def reserved(directory: Path, source: Path, resume: bool) -> Iterator[Journal | None]:
        """Hold a directory for one run; it is created if it is missing.

        Args:
            source: the directory that is read.
        Yields:
            The journal of the run that is to be continued; None without ``resume``.
        Raises:
            QuantizeError: :meth:`check_target` refuses it; another run is writing it; or the
                journal is damaged.
        """
        if not (directory / LOCK).exists():  # a directory of something else is not touched
            Output.check_target(directory, source, resume)
        with locked(directory):
            Output.check_target(directory, source, resume)
            try:
                yield Journal.read(directory) if resume else None
            except TensorError:  # no run can go on with such a model
                _forget_start(directory)
                raise

    @staticmethod
    def check_target(directory: Path, source: Path, resume: bool) -> None:
        """Refuse a directory that cannot be written to as asked.

        Args:
            source: the directory that is read.
        Raises:
            QuantizeError: the directory is ``source`` or inside it; its path is not UTF-8, or a
                link to itself; it has content but is not to be
                resumed; or it is to be resumed and holds no unfinished run.
        """
        try:
            target = directory.resolve()
            str(target).encode()  # safetensors reads no other
        except UnicodeEncodeError:
            raise QuantizeError(f"{directory}: its path is not UTF-8") from None
        except (OSError, RuntimeError):  # which of them depends on the version of Python
            raise QuantizeError(f"{directory}: a link that leads to itself") from None
        if source.resolve() in (target, *target.parents):
            raise QuantizeError(
                f"{directory}: the output must not be the model's own directory, nor inside it"
            )
        if resume:
            _check_resumable(directory)
        else:
            _check_new(directory)

    def write(self, file: str, write: Callable[[Path], Any]) -> None:
        """Write one file.

        Args:
            file: path inside the directory.
            write: is called with a temporary path.
        Raises:
            QuantizeError: it cannot be written, on a full disk for example; names the file.
        """
        self.journal.files[file] = FileEntry.of(self._commit(file, write))

    def write_bytes(self, file: str, content: bytes) -> None:
        """Write one file with this content."""
        self.write(file, lambda path: path.write_bytes(content))

    def write_shard(self, file: str, tensors: dict[str, torch.Tensor], note: Any) -> None:
        """Write one safetensors shard and remember it as finished.

        Args:
            note: JSON to keep with it.
        Raises:
            QuantizeError: see :meth:`write`.
        """
        self.write(file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        self.journal.notes[file] = note
        self._save_journal()

    def read_shard(self, file: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Some tensors of a finished shard."""
        with safe_open(self.directory / file, "pt") as shard:
            return {name: shard.get_tensor(name) for name in names}

    def finish(
        self,
        weight_map: dict[str, str],
        total_size: int,
        config: dict[str, Any],
        sources: Mapping[str, FileEntry],
    ) -> None:
        """Write index, manifest and, last of all, config.json; the run is no longer resumable.

        Args:
            weight_map: tensor name -> shard.
            total_size: bytes of all tensors.
            config: the content of config.json.
            sources: of :class:`~qamw_kernels.format.manifest.Manifest`.
        """
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        self.write_bytes(INDEX, json_bytes(index))
        content = json_bytes(config)
        # The manifest comes before config.json, but lists it.
        entry = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
        manifest = Manifest(self.journal.files | {CONFIG: entry}, sources).to_dict()
        self._commit(MANIFEST, lambda path: path.write_bytes(json_bytes(manifest)))
        self._commit(CONFIG, lambda path: path.write_bytes(content))
        (self.directory / STATE).unlink(missing_ok=True)
        (self.directory / LOCK).unlink(missing_ok=True)  # a run killed here can be resumed
        (self.directory / PROGRESS).unlink()
        sync(self.directory)

    def _take_up(self, unfinished: Journal) -> None:
        """Go on with the finished files whose bytes are still what they were."""
        if unfinished.state != self.journal.state:
            logger.warning(
                "%s: measurements differ from the first run, so all shards are written again",
                self.directory,
            )
            for file in unfinished.files:  # other rates may make other shards
                (self.directory / file).unlink(missing_ok=True)
            return
        for file, entry in unfinished.files.items():
            path = self.directory / file
            same_size = path.is_file() and path.stat().st_size == entry.num_bytes
            if same_size and FileEntry.of(path) == entry:
                self.journal.files[file] = entry
                self.journal.notes[file] = unfinished.notes.get(file)

    def _save_journal(self) -> None:
        content = json_bytes(self.journal.to_dict())
        self._commit(PROGRESS, lambda path: path.write_bytes(content))

    def _commit(self, file: str, write: Callable[[Path], Any]) -> Path:
        path = self.directory / file

        def write_readable(temporary: Path) -> None:
            write(temporary)
            temporary.chmod(0o644)  # safetensors writes files that only their owner can read

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, write_readable)
        except (OSError, SafetensorError) as error:  # safetensors has no OSError for a full disk
            reason = error.strerror if isinstance(error, OSError) else error
            raise QuantizeError(f"{path}: {reason}", *self._way_out()) from None
        return path

    def _way_out(self) -> tuple[str | Option, ...]:
        if not (self._resumable and (self.directory / PROGRESS).exists()):
            return ()
        return "; when this is fixed, ", Option("resume", True), " continues the run"


def _forget_start(directory: Path) -> None:
    """Remove the journal of a run that ended before there was anything to go on from."""
    try:
        journal = Journal.read(directory)
    except QuantizeError:  # there is none, or it is damaged
        return
    if not journal.files and journal.state is None:
        (directory / PROGRESS).unlink()


def _is_blank(directory: Path) -> bool:
    """Whether it is empty, or holds only what a run left that died before its first progress."""
    if not directory.is_dir():
        return False
    left = leftovers(directory)
    return all(path.name in (LOCK, STATE) or path in left for path in directory.iterdir())


def _check_new(directory: Path) -> None:
    if directory.is_symlink() and not directory.exists():
        raise QuantizeError(f"{directory}: a link to {directory.readlink()}, which does not exist")
    if not directory.exists() or _is_blank(directory):
        return
    check_finished(directory, "already exists; it is ")
    raise QuantizeError(f"{directory}: already exists, a new or empty directory was expected")


def _check_resumable(directory: Path) -> None:
    if (directory / PROGRESS).is_file():
        return
    if (directory / CONFIG).is_file():
        state = "is finished"
    elif directory.is_dir():
        state = "holds no unfinished run"
    else:
        state = "does not exist"
    raise QuantizeError(f"{directory}: nothing to resume, the directory {state}")
