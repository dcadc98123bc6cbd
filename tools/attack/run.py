"""One attack: a sound model is copied, damaged, perhaps signed anew, and taken to every door.

Everything about it follows from a seed and a number, so that any one can be repeated.
"""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.attack.doors import DOORS, SOURCE_DOORS, Door
from tools.attack.isolated import Died, Hanging, run_isolated
from tools.attack.models import plain_model, quantized_model
from tools.attack.mutations import MANIFEST, QUANTIZED, SOURCES, Mutation
from tools.attack.reading import MOST_BYTES, Content, may_be_meant, read_content, try_to_read
from tools.attack.verdicts import Delivered, Outcome, Verdict, judge

KINDS: dict[str, Mutation] = {**QUANTIZED, **SOURCES}


# Of writable memory: code that reads an endless file must fail before the machine runs out of it.
MAX_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Victim:
    """A sound model, and what every door hands out for it.

    Attributes:
        directory: of the model.
        content: what :mod:`tools.attack.reading` reads in it.
        expected: by the door's name.
        doors: by name.
    """

    directory: Path
    content: Content
    expected: Mapping[str, Delivered]
    doors: Mapping[str, Door]

    @staticmethod
    def of(directory: Path, doors: Mapping[str, Door]) -> "Victim":
        """Open every door once; after that this process has imported all that they need."""
        expected = {name: door(directory) for name, door in doors.items()}
        return Victim(directory, read_content(directory), expected, doors)


@dataclass(frozen=True)
class Attack:
    """What will be done.

    Attributes:
        number: of the attack; with the seed, all of it follows from that.
        model: the architecture.
        kind: of damage, a key of :data:`KINDS`.
        signed: whether the manifest is made anew afterwards.
    """

    seed: int
    number: int
    model: str
    kind: str
    signed: bool

    @staticmethod
    def of(seed: int, number: int, models: tuple[str, ...]) -> "Attack":
        """All kinds of damage one after the other, then all again on the next model."""
        kinds = list(KINDS)
        kind = kinds[number % len(kinds)]
        model = models[number // len(kinds) % len(models)]
        signable = kind in QUANTIZED and kind != "manifests"
        signed = signable and random.Random(f"{seed} {number} signed").random() < 0.5
        return Attack(seed, number, model, kind, signed)

    def damage(self, directory: Path) -> str:
        """Do it; returns a line that says what was done."""
        line = KINDS[self.kind](directory, random.Random(f"{self.seed} {self.number}"))
        if self.signed:
            sign(directory)
        return f"{line}{', signed anew' if self.signed else ''}"


Victims = Mapping[tuple[str, bool], Victim]
"""(architecture, whether it is quantized) -> the model."""


@contextmanager
def victims_of(models: tuple[str, ...]) -> Iterator[Victims]:
    """While active, the sound models exist in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="qamw-attack-"))
    try:
        victims = {}
        for model in models:
            plain = plain_model(folder / model / "plain", model)
            quantized = quantized_model(folder / model / "quantized", plain)
            victims[model, False] = Victim.of(plain, SOURCE_DOORS)
            victims[model, True] = Victim.of(quantized, DOORS)
        yield victims
    finally:
        shutil.rmtree(folder)


def carry_out(attack: Attack, victims: Victims, limit: float) -> tuple[str, list[Outcome]]:
    """Damage a copy of a model and try all its doors, in a process of their own.

    Args:
        limit: seconds that a door may take.
    Returns:
        What was done, and what every door did.
    """
    victim = victims[attack.model, attack.kind in QUANTIZED]
    with tempfile.TemporaryDirectory(prefix="qamw-attack-") as folder:
        directory = Path(folder) / victim.directory.name
        shutil.copytree(victim.directory, directory)
        line = attack.damage(directory)
        damaged = try_to_read(directory)
        meant = (attack.signed or attack.kind in SOURCES) and may_be_meant(victim.content, damaged)
        names = _names(victim.directory, victim.content) | _names(directory, damaged)
        return line, try_doors(directory, victim, meant, limit, names)


def try_doors(
    directory: Path, victim: Victim, meant: bool, limit: float, names: Collection[str] = ()
) -> list[Outcome]:
    """What every door did with a damaged copy of a model.

    Args:
        meant: whether it may also be a sound checkpoint of another model.
        names: what a message can be about, beside files that are not there.
    """
    names = {f"{directory}/", *names}
    remaining, outcomes = list(victim.doors), []

    def steps() -> Iterator[Outcome]:
        for name in list(remaining):
            door = victim.doors[name]
            yield judge(name, lambda d=door: d(directory), victim.expected[name], meant, names)

    while remaining:  # again after a door that ended its process
        try:
            for outcome in run_isolated(steps, limit, MAX_BYTES):
                outcomes.append(outcome)
                remaining.remove(outcome.door)
        except Hanging as error:
            outcomes.append(Outcome(remaining.pop(0), Verdict.HANGING, str(error)))
        except Died as error:
            outcomes.append(Outcome(remaining.pop(0), Verdict.UNCLEAR, str(error)))
    return outcomes


def sign(directory: Path) -> None:
    """Make the manifest list every file as it is now; nothing is checked."""
    path = directory / MANIFEST
    if not path.is_file():
        return
    files = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file != path and file.stat().st_size < MOST_BYTES:
            content = file.read_bytes()
            files[file.relative_to(directory).as_posix()] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
            }
    path.write_text(json.dumps({"manifest_version": 1, "files": files}))


def _names(directory: Path, content: Content | None) -> set[str]:
    """Names of the files, tensors, modules and settings of a directory."""
    names = {path.name for path in directory.iterdir()}
    if content:
        tensors = set(content.tensors)
        settings = content.config.get("quantization_config", {})
        names |= tensors | {name.rpartition(".")[0] for name in tensors}
        names |= {*content.config, *settings}
    return names
