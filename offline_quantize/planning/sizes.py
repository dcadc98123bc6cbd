"""How much memory and disk a plan takes: estimates, made of named terms."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from offline_quantize import files
from offline_quantize.errors import Option, QuantizeError, is_out_of_memory, shortened
from offline_quantize.model.checkpoint import TensorInfo
from offline_quantize.model.runner import BATCH, DTYPE
from offline_quantize.planning.plan import Plan
from offline_quantize.planning.shards import total_bytes

LIBRARIES_BYTES = 1100 * 2**20  # Python, torch, transformers and matplotlib, imported
SPARE_DISK_BYTES = 64 * 2**20  # for report, plot, index, manifest and what the file system takes
STATES_OF_A_LAYER = 3  # its inputs, its outputs, their gradients
ACTIVATIONS_OF_A_LAYER = 4  # as wide as the widest input, in bfloat16, at once
SHARD_COPIES = 2  # safetensors serializes a copy
FLOAT32_BYTES = 4
FLOAT64_BYTES = 8
FACTOR_MATRICES = 5  # [K, K] in float64: while a Hessian is rotated, damped and factored
LOGIT_ARRAYS = 5  # [T, vocabulary] in float32: logits, probabilities, their sums, gradients


@dataclass(frozen=True)
class MemoryEstimate:
    """What is in memory at the peak of a run, in bytes.

    Attributes:
        libraries: interpreter and libraries.
        layer: the largest decoder layer, or the head, as it is stored.
        shards: the largest output file, and its serialized copy.
        outside_layers: embeddings and head, with calibration.
        states: hidden states of all calibration tokens: inputs, outputs and gradients of a layer.
        activations: what a layer computes for one batch.
        layer_float32: the weights of a layer while it is encoded.
        hessians: of all inputs of a layer.
        factoring: of its widest Hessian, in float64.
        logits: of one window, and what is computed from them.
    """

    libraries: int
    layer: int
    shards: int
    outside_layers: int = 0
    states: int = 0
    activations: int = 0
    layer_float32: int = 0
    hessians: int = 0
    factoring: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """The peak: encoding and logits are not in memory at the same time."""
        always = self.libraries + self.layer + self.shards
        calibration = self.outside_layers + self.states + self.activations
        encoding = self.layer_float32 + self.hessians + self.factoring
        return always + calibration + max(encoding, self.logits)


def estimate_memory(plan: Plan, calibration_tokens: int = 0, processes: int = 1) -> MemoryEstimate:
    """Memory that a run takes, in each of its processes.

    Args:
        calibration_tokens: 0 for a run without calibration.
        processes: that share the tokens; each of them needs all the rest.
    """
    layers = _layer_tensors(plan)
    alone = [[plan.checkpoint.tensors[plan.structure.head_source]]] if plan.head else []
    libraries = LIBRARIES_BYTES
    layer = max(total_bytes(tensors) for tensors in [*layers, *alone])
    shards = SHARD_COPIES * max(shard.num_bytes for shard in plan.shards)
    if not calibration_tokens:
        return MemoryEstimate(libraries, layer, shards)

    window = plan.window_tokens
    batches = -(-calibration_tokens // (BATCH * window))
    own_tokens = min(calibration_tokens, -(-batches // processes) * BATCH * window)
    widths = [list(layer.input_widths().values()) for layer in plan.layers]
    hessians, factoring = max(map(_encoding_bytes, widths), key=sum)
    activations = ACTIVATIONS_OF_A_LAYER * DTYPE.itemsize * BATCH * window
    return MemoryEstimate(
        libraries,
        layer,
        shards,
        outside_layers=total_bytes(plan.checkpoint.tensors.values())
        - sum(map(total_bytes, layers)),
        states=STATES_OF_A_LAYER * state_bytes(plan, own_tokens),
        activations=activations * max(max(own, default=0) for own in widths),
        layer_float32=FLOAT32_BYTES * max(map(_num_elements, layers)),
        hessians=hessians,
        factoring=factoring,
        logits=LOGIT_ARRAYS * FLOAT32_BYTES * window * plan.vocabulary,
    )


@contextmanager
def explained_memory_errors(
    plan: Plan, calibration_tokens: int, out: Path, processes: int = 1
) -> Iterator[None]:
    """Turn any kind of error for too little memory into one that says what helps.

    Args:
        calibration_tokens: see :func:`estimate_memory`.
        out: the output directory.
        processes: see :func:`estimate_memory`.
    Raises:
        QuantizeError: there was too little memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        gibibytes = estimate_memory(plan, calibration_tokens, processes).total / 2**30
        each = " in each process" if processes > 1 else ""
        less: tuple[str | Option, ...] = ()
        if calibration_tokens:
            fewer, none = Option("calibration_tokens"), Option("calibration", None)
            less = ("; a smaller value for ", fewer, ", or ", none, ", needs less")
        kept: tuple[str | Option, ...] = ()
        if (out / files.PROGRESS).exists():
            kept = ("; with more memory, ", Option("resume", True), " continues the run")
        raise QuantizeError(
            f"{out}: not enough memory, the run needs about {gibibytes:.1f} GiB{each} "
            f"({shortened(error)})",
            *less,
            *kept,
        ) from None


def state_bytes(plan: Plan, calibration_tokens: int) -> int:
    """Hidden states of all calibration tokens at the input of one layer."""
    return DTYPE.itemsize * calibration_tokens * plan.structure.state_width


def scratch_bytes(plan: Plan, calibration_tokens: int) -> int:
    """Disk for the hidden states of all layers while sensitivities are measured."""
    return state_bytes(plan, calibration_tokens) * len(plan.layers)


def check_disk(plan: Plan, out: Path, scratch_tokens: int, free: int | None = None) -> None:
    """Refuse a run whose files will not fit on the disk.

    Args:
        out: the output directory; finished shards in it count as written.
        scratch_tokens: calibration tokens whose hidden states are kept in a file, or 0.
        free: bytes that are free, None to ask the file system.
    Raises:
        QuantizeError: less is free than what is still to be written and a little to spare.
    """
    present = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    source = plan.checkpoint
    copies = sum((source.directory / file).stat().st_size for file in source.other_files())
    output = int(plan.output_bytes + plan.bytes_left) - present
    scratch = scratch_bytes(plan, scratch_tokens)
    files.check_space(out, output + copies + scratch + SPARE_DISK_BYTES, free)


def _layer_tensors(plan: Plan) -> list[list[TensorInfo]]:
    """The source tensors of every decoder layer."""
    tensors = plan.checkpoint.tensors
    return [[tensors[name] for name in x.tensors] for x in plan.layers]


def _num_elements(tensors: list[TensorInfo]) -> int:
    return sum(torch.Size(info.shape).numel() for info in tensors)


def _encoding_bytes(widths: list[int]) -> tuple[int, int]:
    """Bytes of the Hessians of all inputs of a layer, and of factoring the widest."""
    hessians = FLOAT32_BYTES * sum(width * width for width in widths)
    return hessians, FACTOR_MATRICES * FLOAT64_BYTES * max(widths, default=0) ** 2
