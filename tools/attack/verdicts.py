"""What became of a damaged checkpoint at a door."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum

from qamw_kernels.errors import QamwError

Delivered = Mapping[str, str]
"""What a door hands out: name of a tensor or text -> a text that identifies its content."""


class Verdict(Enum):
    """The first four are acceptable."""

    REFUSED = "refused"  # by an error of this project that names the file or the tensor
    BY_VLLM = "by vLLM"  # which makes a model of config.json before it asks the plugin
    EQUAL = "equal"  # the door hands out the same as for the original
    OTHER = "other"  # signed again, or a source: it may be another sound model
    SILENT = "silent"  # accepted, and not what it was
    UNCLEAR = "unclear"  # a traceback for users, or a message that names nothing
    HANGING = "hanging"

    @property
    def is_fault(self) -> bool:
        """Whether this must not happen."""
        return self in (Verdict.SILENT, Verdict.UNCLEAR, Verdict.HANGING)


class RefusedByVllm(Exception):
    """vLLM could not make a model of config.json, in its own words."""


@dataclass(frozen=True)
class Outcome:
    """What one door did with one damaged checkpoint.

    Attributes:
        detail: the message, or what differs.
    """

    door: str
    verdict: Verdict
    detail: str = ""


def judge(
    door: str,
    open_door: Callable[[], Delivered],
    expected: Delivered,
    may_be_meant: bool,
    names: Collection[str],
) -> Outcome:
    """Try a door.

    Args:
        open_door: raises, or returns what the door hands out.
        expected: what it hands out for the original.
        may_be_meant: whether what was damaged may also be a sound checkpoint of another model.
        names: one of these must be in the message of a refusal.
    """
    try:
        delivered = open_door()
    except QamwError as error:
        named = any(name in str(error) for name in names)
        return Outcome(door, Verdict.REFUSED if named else Verdict.UNCLEAR, str(error))
    except RefusedByVllm as error:
        return Outcome(door, Verdict.BY_VLLM, str(error))
    except BaseException as error:  # a panic of a Rust library is not an Exception
        return Outcome(door, Verdict.UNCLEAR, f"{type(error).__name__}: {error}")
    different = sorted(
        name for name in {*expected, *delivered} if expected.get(name) != delivered.get(name)
    )
    if not different:
        return Outcome(door, Verdict.EQUAL)
    verdict = Verdict.OTHER if may_be_meant else Verdict.SILENT
    return Outcome(door, verdict, f"{len(different)} differ, the first is {different[0]}")
