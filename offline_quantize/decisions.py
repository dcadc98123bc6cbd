"""What is decided before the work begins, by one process even where several share the work."""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from offline_quantize.calibration.text import MIN_TOKENS, calibration_windows
from offline_quantize.devices import kind_of
from offline_quantize.errors import Option, QuantizeError
from offline_quantize.output.journal import HASHED, Journal
from offline_quantize.output.other_files import check_copies
from offline_quantize.planning.plan import Plan, make_plan
from offline_quantize.planning.request import QuantizeRequest
from offline_quantize.planning.sizes import check_disk
from offline_quantize.progress import Progress


@dataclass(frozen=True)
class Decisions:
    """What a run starts from.

    Attributes:
        plan: as it is before anything is measured; its sources are hashed.
        tokens: windows [windows, window_tokens] int64 of the calibration text; None without
            calibration.
        journal: of this run, still empty.
    """

    plan: Plan
    tokens: torch.Tensor | None
    journal: Journal

    @property
    def num_tokens(self) -> int:
        """Number of calibration tokens; 0 without calibration."""
        return 0 if self.tokens is None else self.tokens.numel()


def decide(
    model: Path,
    out: Path,
    request: QuantizeRequest,
    device: torch.device,
    unfinished: Journal | None,
    processes: int,
    progress: Progress,
) -> Decisions:
    """Make the plan, read the calibration text, check the disk and hash the model's files.

    Args:
        unfinished: the journal of the run to be continued; None for a new run.
        processes: how many share the work.
        progress: the stage is "hashing".
    Raises:
        QuantizeError: the run cannot be carried out as asked.
    """
    plan = make_plan(model, request)
    check_copies(plan, out)
    tokens = _read_tokens(plan)
    check_disk(plan, out, tokens.numel() if tokens is not None and request.mixed else 0)
    plan.checkpoint.sources.hash_all(unfinished.sources if unfinished else {}, progress)
    decisive = _decisive(plan, tokens, device, processes)
    if unfinished:
        unfinished.require(out, decisive)
    return Decisions(plan, tokens, Journal(decisive, plan.checkpoint.sources.files))


def _decisive(
    plan: Plan, tokens: torch.Tensor | None, device: torch.device, processes: int
) -> dict[str, str]:
    """Everything that decides the output's bytes, by name; a resumed run needs it unchanged.

    Args:
        plan: as it is before anything is measured; its source is hashed.
        processes: how many carry the run out.
    """
    packages = ("qamw-vllm", "torch", "transformers", "matplotlib")
    values = plan.request.identity() | {
        "the command": "quantize",
        "device": kind_of(device),
        "the number of processes": processes,
        **{f"the version of {package}": version(package) for package in packages},
    }
    large = {
        "the model's config": plan.checkpoint.config,
        "the content of the model": {
            name: file.sha256 for name, file in plan.checkpoint.sources.files.items()
        },
        "the output's config": plan.format.to_dict(),
        "the division into shards": [[s.file, [t.name for t in s.tensors]] for s in plan.shards],
        "the sequence of calibration tokens": None if tokens is None else tokens.tolist(),
    }
    return {name: str(value) for name, value in values.items()} | {
        name: HASHED + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in large.items()
    }


def _read_tokens(plan: Plan) -> torch.Tensor | None:
    """Windows [windows, window_tokens] int64 of the calibration text; None without calibration."""
    request, directory = plan.request, plan.checkpoint.directory
    if request.calibration is None:
        return None
    at_least = MIN_TOKENS if request.calibration_tokens is None else None
    tokens = calibration_windows(
        directory, request.calibration, plan.calibration_tokens, at_least, plan.window_tokens
    )
    if tokens.max() >= plan.vocabulary:
        raise QuantizeError(
            f"{directory}: its tokenizer produces token id {tokens.max()} from the text, "
            f"but {plan.vocabulary_tensor} has {plan.vocabulary} rows; use ",
            Option("calibration", None),
        )
    return tokens
