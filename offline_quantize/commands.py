"""What every subcommand of ``qamw`` does with its parsed arguments.

Modules that are slow to import are imported in the functions that use them: ``qamw --help`` needs
none of them.
"""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_quantize.errors import Option, QuantizeError, printable
from offline_quantize.files import PROGRESS, REPORT
from offline_quantize.progress import Progress
from qamw_kernels.files import write_atomically

if TYPE_CHECKING:
    from offline_quantize.output.report import Report
    from offline_quantize.planning.plan import Plan
    from offline_quantize.planning.request import QuantizeRequest

NUM_NAMES_SHOWN = 4


def show(*lines: object) -> None:
    """Print lines, escaping the control characters that file and tensor names may hold."""
    for line in lines:
        print(printable(str(line)))


@contextmanager
def progress_bars(**options: Any) -> Iterator[Progress]:
    """A bar for every stage; it appears with the first progress, so a refused request has none.

    Args:
        options: of ``tqdm``.
    """
    from tqdm import tqdm

    with ExitStack() as stack:
        bars: dict[str, tqdm] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bar = tqdm(desc=stage, total=total, dynamic_ncols=True, **options)
                bars[stage] = stack.enter_context(bar)
            bars[stage].update(done - bars[stage].n)

        yield show


def quantize(args: argparse.Namespace) -> None:
    """``qamw quantize MODEL OUT``, in each process that torchrun starts."""
    from offline_quantize import pipeline
    from offline_quantize.model.checkpoint import resolve_model
    from offline_quantize.ranks import joined

    with joined() as ranks, progress_bars(unit_scale=True) as progress:
        request = _request(args)
        report = pipeline.quantize(
            ranks.decide(lambda: resolve_model(args.model)),
            args.out,
            request,
            device=args.device,
            resume=args.resume,
            progress=progress,
            ranks=ranks,
        )
    if ranks.first:
        _print_report(report, args.out, request)


def plan(args: argparse.Namespace) -> None:
    """``qamw plan MODEL``."""
    from offline_quantize.calibration.documents import read_documents
    from offline_quantize.model.checkpoint import resolve_model
    from offline_quantize.output.other_files import check_copies
    from offline_quantize.planning.plan import make_plan

    request = _request(args)
    if request.calibration:
        read_documents(request.calibration)  # or an error, as quantize would give
    made = make_plan(resolve_model(args.model), request)
    check_copies(made, made.checkpoint.directory)
    _print_table(made)
    _print_sizes(made, args.processes)


def dequantize(args: argparse.Namespace) -> None:
    """``qamw dequantize CKPT OUT``."""
    import torch

    from offline_quantize.checkpoints.dequantize import dequantize

    dtype = getattr(torch, args.dtype)
    with progress_bars(unit="B", unit_scale=True, delay=1) as progress:
        num_bytes = dequantize(args.checkpoint, args.out, dtype, progress)
    show(f"{args.out}: {num_bytes / 1e6:.1f} MB")


def inspect(args: argparse.Namespace) -> None:
    """``qamw inspect CKPT``."""
    from offline_quantize.checkpoints.inspect import inspect

    show(inspect(args.checkpoint))


def verify(args: argparse.Namespace) -> None:
    """``qamw verify CKPT [--sign]``."""
    from offline_quantize.checkpoints.verify import verify

    show(verify(args.checkpoint, args.sign))


def evaluate(args: argparse.Namespace) -> None:
    """``qamw eval CKPT ... --reference MODEL --text FILE``."""
    import torch

    from offline_quantize.calibration.documents import read_text
    from offline_quantize.devices import usable_device
    from offline_quantize.evaluation.conventions import CONVENTIONS
    from offline_quantize.evaluation.report import plot, table, to_json
    from offline_quantize.evaluation.request import EvaluationRequest
    from offline_quantize.evaluation.run import evaluate
    from offline_quantize.model.checkpoint import resolve_model

    for path in (args.json, args.plot):
        if path:
            _check_writable(path)  # known before the work, not after it
    if args.json and args.json == args.plot:
        raise QuantizeError(Option("json"), " and ", Option("plot"), f" are both {args.plot}")
    text, device = read_text(args.text), usable_device(args.device)  # before a download
    request = EvaluationRequest(
        reference=resolve_model(args.reference),
        checkpoints=tuple(map(resolve_model, args.checkpoints)),
        text=text,
        conventions=tuple(args.convention or CONVENTIONS),
        windows=args.windows,
        bos=args.bos,
        dtype=getattr(torch, args.dtype),
        engine=args.engine,
        device=device,
        noise_windows=args.noise_windows,
    )
    with progress_bars(unit="window", delay=1) as progress:
        evaluation = evaluate(request, progress)
    settings = {"engine": args.engine, "dtype": args.dtype}
    try:
        if args.json:
            content = to_json(evaluation, args.command_line, args.text, request.text, settings)
            write_report(args.json, content)
        if args.plot:
            write_report(args.plot, plot(evaluation))
    finally:  # figures are not lost where a file cannot be written
        show(table(evaluation, settings))


def environment(args: argparse.Namespace) -> None:
    """``qamw env``."""
    from offline_quantize.environment import describe_environment

    rows = describe_environment()
    width = max(len(name) for name, _ in rows)
    show(*(f"{name:{width}}  {value}" for name, value in rows))


def kept_after_interruption(args: argparse.Namespace) -> str:
    """What is left of an interrupted command, as the end of a sentence."""
    if args.command != "quantize":
        return ""
    if not (args.out / PROGRESS).exists():
        return "; nothing is kept"
    finished = len(list(args.out.glob("*.safetensors")))
    return f"; --resume continues after {finished} finished shards"


def _request(args: argparse.Namespace) -> "QuantizeRequest":
    from offline_quantize.calibration.text import DEFAULT_TEXT
    from offline_quantize.planning.request import QuantizeRequest

    known = {"none": None, "default": DEFAULT_TEXT}
    return QuantizeRequest(
        bpw=args.bpw,
        calibration=known.get(args.calibration, args.calibration),
        calibration_tokens=args.calibration_tokens,
        effort=args.effort,
        encoder=args.encoder,
        code=args.code,
        rates=args.rates,
        tp_max=args.tp_max,
        ignore=args.ignore,
        allow_partial=args.allow_partial,
        quantize_lm_head=args.quantize_lm_head,
    )


def _print_report(report: "Report", out: Path, request: "QuantizeRequest") -> None:
    without_head = " without the head" if request.quantize_lm_head else ""
    show(
        f"{out}: {report.output_bytes / 1e6:.1f} MB, "
        f"{report.effective_bits_per_weight:.3f} effective bits per weight{without_head}, "
        f"tensor-parallel sizes {', '.join(map(str, report.tensor_parallel_sizes))}"
    )
    if missed := report.not_reached:
        more = f" ... (all in {out / REPORT})" if len(missed) > NUM_NAMES_SHOWN else ""
        show(
            f"{len(missed)} layers were quantized without calibration, because no token of the "
            f"text reached them or had an effect there: {', '.join(missed[:NUM_NAMES_SHOWN])}{more}"
        )
    show("largest errors:", *(f"  {line}" for line in report.worst_layers))
    show(f"serve it with: vllm serve {shlex.quote(str(out))} --quantization qamw")


def _print_table(made: "Plan") -> None:
    from offline_quantize.planning.table import plan_table

    rows = plan_table(made)
    width = max(len(row.name) for row in rows)
    for row in rows:
        show(
            f"{row.name:{width}} {row.count:5} x {row.shape:>13}  {row.decision:24} "
            f"{row.num_bytes / 1e6:10.2f} MB"
        )


def _print_sizes(made: "Plan", processes: int) -> None:
    from offline_quantize.planning.duration import MACHINE, estimate_seconds, in_words
    from offline_quantize.planning.plan import HEAD_INDEX_BITS
    from offline_quantize.planning.selection import kept_matrices
    from offline_quantize.planning.sizes import estimate_memory, scratch_bytes
    from qamw_kernels.format.rates import nominal_bits_per_weight

    request, tokens = made.request, made.calibration_tokens
    weights = made.num_quantized_weights
    effective = made.effective_bits_per_weight + 8 * made.bytes_left / weights
    head = f", and the head at {nominal_bits_per_weight(HEAD_INDEX_BITS):g}" if made.head else ""
    show(
        f"{weights / 1e6:.1f} M weights quantized at {effective:.3f} effective bits per weight"
        f"{head}; {made.format.code} code"
    )
    scratch = ""
    if request.mixed:
        megabytes = scratch_bytes(made, tokens) / 1e6
        scratch = f", and {megabytes:.1f} MB of scratch while quantizing"
    show(
        f"disk: {(made.output_bytes + made.bytes_left) / 1e6:.1f} MB in {len(made.shards)} shards, "
        f"instead of {made.checkpoint.source_bytes / 1e6:.1f} MB{scratch}"
    )
    if made.checkpoint.encoding:
        show(f"the model is already quantized ({made.checkpoint.encoding}), and is decoded first")
    gibibytes = estimate_memory(made, tokens, processes).total / 2**30
    each = f" in each of {processes} processes" if processes > 1 else ""
    read = f", for up to {tokens} tokens of calibration text" if tokens else ""
    show(f"peak memory while quantizing: about {gibibytes:.1f} GiB{each}{read}")
    if processes == 1:
        show(f"time: {in_words(estimate_seconds(made))} on {MACHINE} (estimated)")
    if kept := kept_matrices(made.structure):
        show(
            f"{made.structure.kept_share:.1%} of the decoder's weights stay as they are:",
            *(f"  {line}" for line in kept),
        )
    served = ", ".join(map(str, made.tensor_parallel_sizes))
    show(f"tensor-parallel sizes up to {request.tp_max} that can serve the result: {served}")


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise QuantizeError(f"{path}: is a directory")
    if not path.parent.is_dir():
        raise QuantizeError(f"{path}: {path.parent} is not a directory")


def write_report(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a link, device or pipe is written to directly.

    Raises:
        QuantizeError: it cannot be written.
    """
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(content)  # a file must not replace a device or a pipe
        else:
            write_atomically(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise QuantizeError(f"{path}: {error.strerror}") from None
