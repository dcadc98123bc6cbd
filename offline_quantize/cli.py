"""The command line: ``qamw``, the same as ``python -m offline_quantize``."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from offline_quantize.errors import QuantizeError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qamw", description="Quantise Hugging Face checkpoints to QAM-W, for vLLM.")
    parser.add_argument("--version", action="version", version=f"qamw-vllm {version('qamw-vllm')}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_model_options(command: argparse.ArgumentParser) -> None:
        command.add_argument("model", metavar="MODEL", help="Hugging Face directory, or a hub id where there is a network")
        command.add_argument("--bpw", type=float, default=5.5, help=(
            "bits per weight, 3 to 6 (default 5.5): what the indices take on average for 3, 3.5 ... 6, "
            "what the quantised layers take with all that is stored for any other value"))
        command.add_argument("--calibration", default="default", metavar="FILE|none", help=(
            "UTF-8 text like what the model will read, 16 thousand tokens or more (default: encyclopedia articles that come with qamw); "
            "none: less time, larger errors"))
        command.add_argument("--calibration-tokens", type=_at_least(1), metavar="N", help=(
            "how many tokens of the text are read, in windows of 512; more take more time (default: 3 for each input of the widest layer, "
            "at least 16384, at most what the text has)"))
        command.add_argument("--encoder", choices=["feedback", "nearest"], help=(
            "feedback: pairs make up for errors of those before them (default with calibration); nearest: they do not"))
        command.add_argument("--rates", choices=["mixed", "uniform"], help=(
            "mixed: more bits for layers, more weight for tokens whose errors cost more, found by a pass forwards and backwards "
            "(default with calibration); uniform: the same for all, in half the time"))
        command.add_argument("--tp-max", type=int, default=8, help="widest tensor parallelism to prepare for (default 8)")
        command.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                             help="leave linear layers of this glob pattern as they are; may be repeated")
        command.add_argument("--quantize-lm-head", action="store_true", help=(
            "also the head that makes logits, at 6 bits per weight; it gets a weight of its own where it shared that of the embeddings"))

    quantize = commands.add_parser("quantize", help="quantise MODEL into the new directory OUT")
    add_model_options(quantize)
    quantize.add_argument("out", metavar="OUT", type=Path, help="a new or empty directory")
    quantize.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    quantize.add_argument("--resume", action="store_true", help="continue an interrupted run of the same request")
    add_model_options(commands.add_parser("plan", help="say what quantize would do; reads headers only"))
    dequantize = commands.add_parser("dequantize", help="write the plain checkpoint that CKPT stands for into the new directory OUT")
    dequantize.add_argument("checkpoint", metavar="CKPT", type=Path)
    dequantize.add_argument("out", metavar="OUT", type=Path, help="a new or empty directory")
    dequantize.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                            help="of the weights that were quantised (default bfloat16)")
    for name, text in (("inspect", "show what is inside a quantised checkpoint, per layer"),
                       ("verify", "check every byte against the manifest, every tensor against the format")):
        commands.add_parser(name, help=text).add_argument("checkpoint", metavar="CKPT", type=Path)
    _add_eval_options(commands.add_parser("eval", help="measure perplexity and KL divergence against the original model"))
    return parser


def _add_eval_options(command: argparse.ArgumentParser) -> None:
    from offline_quantize.evaluation.conventions import BOS_RULE, CONVENTIONS

    command.add_argument("checkpoints", metavar="CKPT", nargs="+", help="what to measure: QAM-W or plain, directory or hub id")
    command.add_argument("--reference", metavar="MODEL", required=True, help="the original model")
    command.add_argument("--text", metavar="FILE", type=Path, required=True, help="the raw WikiText test split, or any UTF-8 text")
    command.add_argument("--convention", action="append", choices=list(CONVENTIONS), metavar="NAME",
                         help=f"{', '.join(CONVENTIONS)}; may be repeated (default all). KL is measured in the first")
    command.add_argument("--windows", type=_at_least(1), metavar="N", help="at most so many windows per convention (lm-eval: whole pages)")
    command.add_argument("--bos", choices=["auto", "yes", "no"], default="auto", help=BOS_RULE)
    command.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the models; logits are always float32")
    command.add_argument("--engine", choices=["transformers", "vllm"], default="transformers",
                         help="what runs CKPT: transformers with decoded weights, or vLLM as it serves it")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    command.add_argument("--noise-windows", type=_at_least(0), default=2, metavar="N",
                         help="windows for the noise floor of bfloat16 (default 2, 0: none)")
    command.add_argument("--json", metavar="FILE", type=Path, help="write all figures, and what they were measured with")
    command.add_argument("--plot", metavar="FILE", type=Path, help="write a PNG: distribution of KL over tokens, and by window")


def _at_least(minimum: int) -> Callable[[str], int]:
    def count(value: str) -> int:
        if (number := int(value)) < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {value}")
        return number

    return count


def _calibration(value: str) -> Path | None:
    from offline_quantize.calibration.hessians import DEFAULT_TEXT

    return None if value == "none" else DEFAULT_TEXT if value == "default" else Path(value)


def _quantize(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from offline_quantize.model.checkpoint import resolve_model
    from offline_quantize.pipeline import quantize
    from offline_quantize.output.report import REPORT

    with ExitStack() as stack:
        bars: dict[str, tqdm] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:  # only once there is something to show: a refused request has no bar
                bars[stage] = stack.enter_context(tqdm(total=total, unit_scale=True, desc=stage, dynamic_ncols=True))
            bars[stage].update(done - bars[stage].n)

        report = quantize(resolve_model(args.model), args.out, args.bpw, _calibration(args.calibration), args.tp_max,
                          args.ignore, args.device, args.resume, progress, encoder=args.encoder, rates=args.rates,
                          quantize_lm_head=args.quantize_lm_head, calibration_tokens=args.calibration_tokens)
    print(f"{args.out}: {report['output_bytes'] / 1e6:.1f} MB, {report['effective_bits_per_weight']:.3f} effective bits per weight"
          f"{' without the head' if args.quantize_lm_head else ''}, "
          f"tensor-parallel sizes {', '.join(map(str, report['tensor_parallel_sizes']))}")
    if missed := report["not_reached"]:
        print(f"{len(missed)} layers were coded without calibration, because none of its tokens reached them, or none mattered: "
              + ", ".join(missed[:4])
              + (f" ... (all in {args.out / REPORT})" if len(missed) > 4 else ""))
    print("largest errors:", *report["worst_layers"], sep="\n  ")
    print(f"serve it with: vllm serve {args.out} --quantization qamw")


def _plan(args: argparse.Namespace) -> None:
    from offline_quantize.calibration.hessians import default_num_tokens
    from offline_quantize.model.checkpoint import resolve_model
    from offline_quantize.planning.plan import HEAD_INDEX_BITS, make_plan
    from offline_quantize.pipeline import chosen_method

    text = _calibration(args.calibration)
    _, rates = chosen_method(args.bpw, text, args.encoder, args.rates, args.calibration_tokens)
    if text and not text.is_file():
        raise QuantizeError(f"--calibration {text}: no such file")
    plan = make_plan(resolve_model(args.model), args.bpw, args.tp_max, args.ignore, quantize_lm_head=args.quantize_lm_head)
    plan.checkpoint.other_files()  # which will be copied: refuses links that lead out
    rows = plan.table(mixed=rates == "mixed")
    width = max(len(row[0]) for row in rows)
    for name, count, shape, decision, megabytes in rows:
        print(f"{name:{width}} {count:5} x {shape:>13}  {decision:24} {megabytes:10.2f} MB")
    tokens = (args.calibration_tokens or default_num_tokens(plan.widest)) if text else 0
    more_bytes = plan.more_bytes_within(args.bpw)
    effective = plan.effective_bits_per_weight + 8 * more_bytes / plan.num_quantized_weights
    print(f"{plan.num_quantized_weights / 1e6:.1f} M weights quantised at {effective:.3f} effective bits per weight"
          + (f", and the head at {HEAD_INDEX_BITS / 2:g}" if plan.head else ""))
    scratch = f", and {plan.scratch_bytes(tokens) / 1e6:.1f} MB of scratch while quantising" if rates == "mixed" else ""
    megabytes = (plan.output_bytes + more_bytes) / 1e6
    print(f"disk: {megabytes:.1f} MB in {len(plan.shards)} shards, instead of {plan.source_bytes / 1e6:.1f} MB{scratch}")
    read = f", for {tokens} tokens of calibration text" if text else ""
    print(f"peak memory while quantising: about {plan.peak_memory_bytes(tokens) / 2**30:.1f} GiB{read}")
    served = ", ".join(map(str, plan.tensor_parallel_sizes))
    print(f"tensor-parallel sizes up to {args.tp_max} that can serve the result: {served}")


def _dequantize(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from offline_quantize.checkpoints.dequantize import dequantize

    with tqdm(unit="B", unit_scale=True, desc="dequantising", dynamic_ncols=True, delay=1) as bar:
        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        num_bytes = dequantize(args.checkpoint, args.out, getattr(torch, args.dtype), progress)
    print(f"{args.out}: {num_bytes / 1e6:.1f} MB")


def _inspect(args: argparse.Namespace) -> None:
    from offline_quantize.checkpoints.verify import inspect

    print(inspect(args.checkpoint))


def _verify(args: argparse.Namespace) -> None:
    from offline_quantize.checkpoints.verify import verify

    print(verify(args.checkpoint))


def _eval(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from offline_quantize.model.checkpoint import resolve_model
    from offline_quantize.evaluation.conventions import CONVENTIONS
    from offline_quantize.evaluation.run import evaluate, read_text
    from offline_quantize.evaluation.report import plot, table, to_json, write_atomically
    from offline_quantize.pipeline import usable_device

    for path in (args.json, args.plot):
        if path and (path.is_dir() or not path.parent.is_dir()):  # known before the work, not after it
            raise QuantizeError(f"{path}: is a directory" if path.is_dir() else f"{path}: {path.parent} is not a directory")
    raw = read_text(args.text)
    conventions = list(dict.fromkeys(args.convention or CONVENTIONS))
    with tqdm(unit="window", desc="evaluating", dynamic_ncols=True, delay=1) as bar:
        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        evaluation = evaluate(
            resolve_model(args.reference), [resolve_model(c) for c in args.checkpoints], raw, conventions, args.windows, args.bos,
            getattr(torch, args.dtype), args.engine, usable_device(args.device), args.noise_windows, progress)
    settings = {"engine": args.engine, "dtype": args.dtype}
    if args.json:
        write_atomically(args.json, to_json(evaluation, args.command_line, args.text, raw, settings))
    if args.plot:
        write_atomically(args.plot, plot(evaluation))
    print(table(evaluation, settings))


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with a message on standard error when it cannot be carried out."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.command_line = ["qamw", *argv]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no plus-minus must not end a run
    run = {"quantize": _quantize, "plan": _plan, "dequantize": _dequantize, "inspect": _inspect, "verify": _verify,
           "eval": _eval}[args.command]
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (QuantizeError, ValueError, OSError) as error:  # ValueError: a bad tensor; OSError: a full disk
        print(f"qamw: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        from offline_quantize.output.directory import PROGRESS

        kept = "; nothing is kept" if args.command == "quantize" else ""
        if kept and (args.out / PROGRESS).exists():
            kept = f"; --resume goes on after {len(list(args.out.glob('*.safetensors')))} finished shards"
        print(f"qamw: interrupted{kept}", file=sys.stderr)
        return 130
    return 0
