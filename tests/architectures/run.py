"""Take architectures through their stages: ``python -m tests.architectures.run RECORDS [NAMES]``.

RECORDS is a file of JSON lines, one for each architecture; :mod:`.table` makes pages of them.
``--offline`` leaves vLLM out. Many stages share a process, but a process ends after the first stage
that starts an engine. If a stage hangs or kills its process, a new process continues after that
stage. All are forked from this process, which has imported what they need.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.architectures.build import architectures
from tests.architectures.outcomes import (
    ENGINE,
    NEEDS,
    OFFLINE,
    Outcome,
    Record,
    Status,
    outcome_of,
    write_records,
)
from tests.architectures.serving import ENVIRONMENT, Engine
from tests.architectures.stages import Offline
from tests.architectures.vision import import_torchvision
from tests.helpers.engine_script import import_engine
from tools.attack.isolated import Died, Hanging, run_isolated

LIMIT = 240  # seconds of one stage

Step = tuple[str, str, Outcome | None, float | None]
"""Architecture, stage, how it ended or None before it starts, the record's share."""


def run(
    names: Sequence[str],
    folder: Path,
    file: Path,
    stages: Sequence[str] = tuple(NEEDS),
    limit: float = LIMIT,
) -> list[Record]:
    """Take architectures through stages.

    Args:
        file: the records, written anew after every stage.
        folder: for checkpoints; several hundred MB for all architectures.
        limit: seconds that one stage may take.
    """
    records = {name: Record(name) for name in names}
    tasks = [(name, stage) for name in names for stage in stages]
    while tasks:
        at, start, has_more = 0, time.monotonic(), False
        try:
            for name, stage, outcome, share in run_isolated(
                partial(_steps, tasks, records, folder), limit
            ):
                at = tasks.index((name, stage))
                if outcome:
                    _note(records[name], stage, outcome, share, start)
                    write_records(file, records.values())
                    has_more = stage in ENGINE  # the next stages run in another process
                    at += 1
                start = time.monotonic()
            at = at if has_more else len(tasks)
        except (Hanging, Died) as error:
            name, stage = tasks[at]
            status: Status = "not applicable" if stage == "plain" else "failed"
            outcome = Outcome(status, f"{type(error).__name__}: {error}")
            _note(records[name], stage, outcome, None, start)
            write_records(file, records.values())
            at += 1
        tasks = tasks[at:]
    return list(records.values())


def _note(record: Record, stage: str, outcome: Outcome, share: float | None, start: float) -> None:
    record.stages[stage] = outcome
    record.kept_share = record.kept_share if share is None else share
    seconds = time.monotonic() - start
    record.seconds += seconds
    line = f"{record.architecture} {stage}: {outcome.status} {outcome.message} ({seconds:.1f} s)"
    print(line, flush=True)


def _steps(
    tasks: Sequence[tuple[str, str]], records: dict[str, Record], folder: Path
) -> Iterator[Step]:
    """What is done in a process of its own, which has its own copy of the records."""
    for name, stage in tasks:
        record = records[name]
        if not record.reaches(stage):
            continue
        yield name, stage, None, None
        record.stages[stage], share = perform(name, stage, folder / name)
        yield name, stage, record.stages[stage], share
        if stage in ENGINE:
            return


def perform(name: str, stage: str, folder: Path) -> tuple[Outcome, float | None]:
    """Take one architecture through one stage, in this process.

    Args:
        folder: of this architecture, where the stages before have left what they made.
    Returns:
        How it ended, and the share of the plan if one was made.
    """
    folder.mkdir(exist_ok=True)
    stages = (Offline if stage in OFFLINE else Engine)(architectures()[name], folder)
    outcome = outcome_of(getattr(stages, stage), folder)
    return outcome, getattr(stages, "kept_share", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("names", nargs="*", default=list(architectures()))
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_intermixed_args()
    stages = OFFLINE if args.offline else OFFLINE + ENGINE
    with tempfile.TemporaryDirectory(prefix="qamw-architectures-") as folder:
        os.environ |= {**ENVIRONMENT, "VLLM_CACHE_ROOT": f"{folder}/cache"}
        import_torchvision()
        if not args.offline:
            import_engine()
        run(args.names, Path(folder), args.records, stages)


if __name__ == "__main__":
    main()
