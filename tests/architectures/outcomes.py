"""What became of an architecture, stage by stage, and how it is written down."""

import json
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offline_quantize.errors import shortened
from qamw_kernels.errors import QamwError
from tools.attack.serving import plugins_error

Status = Literal["passed", "refused", "failed", "not applicable"]
"""Not applicable: without this project, the plain model does not get that far either."""

NEEDS = {
    "build": (),
    "plan": ("build",),
    "none": ("plan",),
    "dequantize": ("none",),
    "transformers": ("dequantize",),
    "calibrated": ("plan",),
    "plain": ("build",),
    "vllm": ("plain", "dequantize"),
    "tensor_parallel": ("dequantize",),
    "uncalibrated": ("plain", "none"),
    "loading": ("uncalibrated",),
}
"""Stages in order -> those which must have passed before:

    build         transformers makes the tiny checkpoint, and reads it again
    plan          ``make_plan``
    none          quantized without calibration, and verified
    dequantize    the checkpoint of ``none`` decoded to bfloat16; transformers reads all of it
    transformers  the quantized checkpoint read by transformers, against the decoded one
    calibrated    quantized with a few tokens, and verified
    plain         vLLM's CPU engine serves the tiny checkpoint itself
    vllm          it serves the quantized checkpoint, against the decoded one
    tensor_parallel  its model class loads the quantized checkpoint on each of two ranks, against
                  the decoded one
    uncalibrated  it serves the checkpoint of ``none``
    loading       it quantizes while loading, against the uncalibrated checkpoint
"""
OFFLINE = tuple(NEEDS)[: tuple(NEEDS).index("plain")]
ENGINE = tuple(NEEDS)[len(OFFLINE) :]

EXPECTED = Path(__file__).with_name("expected.json")


class NotApplicable(Exception):
    """The plain model cannot do this either; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """How one stage ended.

    Attributes:
        message: why it did not pass, on one line.
    """

    status: Status
    message: str = ""


@dataclass
class Record:
    """How the stages of one architecture ended.

    Attributes:
        stages: those that were reached.
        kept_share: share of the weights in the decoder's matrices that stay in 16 bits; None
            without a plan.
        seconds: that all stages took.
    """

    architecture: str
    stages: dict[str, Outcome] = field(default_factory=dict)
    kept_share: float | None = None
    seconds: float = 0

    def reaches(self, stage: str) -> bool:
        """Whether all that a stage needs has passed."""
        return all(
            need in self.stages and self.stages[need].status == "passed" for need in NEEDS[stage]
        )

    def is_blocked(self, stage: str) -> bool:
        """Whether something that a stage needs was tried and has not passed."""
        return any(
            self.stages[need].status != "passed" if need in self.stages else self.is_blocked(need)
            for need in NEEDS[stage]
        )

    def after(self, earlier: "Record") -> "Record":
        """This record, with stages of an earlier one that were left out this time.

        Stages that need one that has not passed this time are dropped.
        """
        share = earlier.kept_share if self.kept_share is None else self.kept_share
        both = Record(self.architecture, {}, share, self.seconds)
        found = earlier.stages | self.stages
        for stage in NEEDS:
            if stage in found and both.reaches(stage):
                both.stages[stage] = found[stage]
        return both

    def to_json(self) -> str:
        """One line of JSON."""
        stages = {
            stage: [outcome.status, *([outcome.message] if outcome.message else [])]
            for stage, outcome in self.stages.items()
        }
        return json.dumps(
            {
                "architecture": self.architecture,
                "stages": stages,
                "kept_share": self.kept_share,
                "seconds": round(self.seconds, 1),
            }
        )

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """What ``to_json`` wrote."""
        values = json.loads(line)
        stages = {stage: Outcome(*found) for stage, found in values.pop("stages").items()}
        return cls(stages=stages, **values)


def read_records(file: Path) -> list[Record]:
    """All records of a file of JSON lines."""
    return [Record.from_json(line) for line in file.read_text().splitlines()]


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Write them as JSON lines, except those without any stage reached."""
    file.write_text("".join(f"{record.to_json()}\n" for record in records if record.stages))


def outcome_of(action: Callable[[], Any], hide: Path) -> Outcome:
    """Run a stage and judge how it ends.

    Only the project's own kinds of error are refusals; any other exception has failed.

    Args:
        hide: a directory whose path is left out of messages, as it differs from run to run.
    """
    try:
        action()
    except NotApplicable as reason:
        return Outcome("not applicable", _line(reason, hide))
    except QamwError as error:
        return Outcome("refused", _line(error, hide))
    except Exception as error:
        if refusal := plugins_error(error):
            return Outcome("refused", _line(refusal, hide))
        return Outcome("failed", _line(described(error), hide))
    return Outcome("passed")


def described(error: Exception) -> str:
    """Kind, message and place of an error: assertions have no message."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"{type(error).__name__}: {error} ({where})"


def _line(message: object, hide: Path) -> str:
    text = str(message)
    with suppress(ValueError):
        text = text.replace(f"{hide}/", "")
    return shortened(text)


def expectations(records: Iterable[Record]) -> dict[str, dict[str, list[str]]]:
    """What expected.json says of architectures that end as these did."""
    return {
        record.architecture: {
            stage: [outcome.status, outcome.message]
            for stage, outcome in record.stages.items()
            if outcome.status != "passed"
        }
        for record in records
    }


def differences(records: Iterable[Record], expected: dict[str, dict[str, list[str]]]) -> list[str]:
    """A line for each stage that ended differently from what is expected, better or worse.

    Args:
        expected: architecture -> stage -> status and message, of stages that do not pass; those
            that need one of them are not reached, and all others pass.
    """
    return [
        f"{record.architecture} {stage}: {found.status}, expected {wanted[0]}"
        f" ({found.message or '; '.join(wanted[1:])})"
        for record in records
        for stage, found in record.stages.items()
        if found.status != (wanted := expected[record.architecture].get(stage, ["passed"]))[0]
    ]
