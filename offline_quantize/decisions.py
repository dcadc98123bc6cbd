"""What is decided before the work begins: by one process, also where several share the work."""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from offline_quantize.calibration.text import MIN_TOKENS, calibration_windows
from offline_quantize.errors import Option, QuantizeError
from offline_quantize.output.journal import Journal
from offline_quantize.output.other_files import check_copies
from offline_quantize.planning.plan import Plan, make_plan
from offline_quantize.planning.request import QuantizeRequest
from offline_quantize.planning.sizes import check_disk
from offline_quantize.progress import Progress


@dataclass(frozen=True)
class Decisions:
    """With what a run begins.

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
        """Of calibration."""
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
    """Decide everything that is decided before the work.

    Args:
        unfinished: of the run that is to be continued.
        processes: how many share the work.
        progress: the stage is "hashing".
    Raises:
        QuantizeError: something speaks against the run.
    """
    plan = make_plan(model, request)
    check_copies(plan, out)
    tokens = _read_tokens(plan)
    check_disk(plan, out, tokens.numel() if tokens is not None and request.mixed else 0)
    plan.checkpoint.sources.hash_all(unfinished.sources if unfinished else {}, progress)
    fingerprint = _fingerprint(plan, tokens, device, processes)
    if unfinished:
        unfinished.require(out, fingerprint)
    return Decisions(plan, tokens, Journal(fingerprint, plan.checkpoint.sources.files))


def _fingerprint(
    plan: Plan, tokens: torch.Tensor | None, device: torch.device, processes: int
) -> str:
    """Hash of everything that decides the output's bytes; a resumed run needs it unchanged.

    Args:
        plan: as it is before anything is measured; its source is hashed.
        processes: how many carry the run out.
    """
    packages = ("qamw-vllm", "torch", "transformers", "matplotlib")
    decisive = {
        "versions": [version(package) for package in packages],
        "device": device.type,
        "processes": processes,
        "request": plan.request.identity(),
        "config": plan.checkpoint.config,
        "format": plan.format.to_dict(),
        "sources": {name: file.sha256 for name, file in plan.checkpoint.sources.files.items()},
        "shards": [[shard.file, [t.name for t in shard.tensors]] for shard in plan.shards],
        "tokens": None,
    }
    if tokens is not None:
        decisive["tokens"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _read_tokens(plan: Plan) -> torch.Tensor | None:
    """Windows [windows, window_tokens] int64 of the calibration text; None without calibration."""
    request, directory = plan.request, plan.checkpoint.directory
    if request.calibration is None:
        return None
    num_tokens, at_least = request.calibration_tokens, None
    if num_tokens is None:
        num_tokens, at_least = request.default_tokens(plan.widest), MIN_TOKENS
    tokens = calibration_windows(
        directory, request.calibration, num_tokens, at_least, request.window_tokens
    )
    if tokens.max() >= plan.vocabulary:
        raise QuantizeError(
            f"{directory}: its tokenizer makes token {tokens.max()} of the text, "
            f"but {plan.structure.head_source} has {plan.vocabulary} rows; use ",
            Option("calibration", None),
        )
    return tokens
