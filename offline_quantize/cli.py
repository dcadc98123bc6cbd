"""The command line: ``qamw``, the same as ``python -m offline_quantize``."""

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from offline_quantize.errors import QuantizeError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qamw", description="Quantise Hugging Face checkpoints to QAM-W, for vLLM.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_model_options(command: argparse.ArgumentParser) -> None:
        command.add_argument("model", metavar="MODEL", help="Hugging Face directory, or a hub id where there is a network")
        command.add_argument("--bpw", type=float, default=5.5, help="bits per weight: 3, 3.5 ... 6 (default 5.5)")
        command.add_argument("--calibration", default="default", metavar="FILE|none",
                             help="UTF-8 text for activation-aware scales (default: a text that comes with qamw)")
        command.add_argument("--tp-max", type=int, default=8, help="widest tensor parallelism to prepare for (default 8)")
        command.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                             help="leave linear layers of this glob pattern as they are; may be repeated")

    quantize = commands.add_parser("quantize", help="quantise MODEL into the new directory OUT")
    add_model_options(quantize)
    quantize.add_argument("out", metavar="OUT", type=Path)
    quantize.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    quantize.add_argument("--resume", action="store_true", help="continue an interrupted run of the same request")
    add_model_options(commands.add_parser("plan", help="say what quantize would do; reads headers only"))
    for name, text in (("inspect", "show what is inside a quantised checkpoint, per layer"),
                       ("verify", "check every byte against the manifest, every tensor against the format")):
        commands.add_parser(name, help=text).add_argument("checkpoint", metavar="CKPT", type=Path)
    return parser


def _calibration(value: str) -> Path | None:
    from offline_quantize.calibration import DEFAULT_TEXT

    return None if value == "none" else DEFAULT_TEXT if value == "default" else Path(value)


def _quantize(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from offline_quantize.checkpoint import resolve_model
    from offline_quantize.quantize import quantize

    with ExitStack() as stack:
        bar: tqdm | None = None

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:  # only once there is something to show: a refused request has no bar
                bar = stack.enter_context(tqdm(total=total, unit="weight", unit_scale=True, desc="quantising", dynamic_ncols=True))
            bar.update(done - bar.n)

        report = quantize(resolve_model(args.model), args.out, args.bpw, _calibration(args.calibration), args.tp_max,
                          args.ignore, args.device, args.resume, progress)
    print(f"{args.out}: {report['output_bytes'] / 1e6:.1f} MB, {report['effective_bits_per_weight']:.3f} effective bits per weight, "
          f"tensor-parallel sizes {', '.join(map(str, report['tensor_parallel_sizes']))}")
    print("largest errors:", *report["worst_layers"], sep="\n  ")
    print(f"serve it with: vllm serve {args.out} --quantization qamw")


def _plan(args: argparse.Namespace) -> None:
    from offline_quantize.calibration import NUM_WINDOWS, WINDOW_TOKENS
    from offline_quantize.checkpoint import resolve_model
    from offline_quantize.plan import make_plan

    plan = make_plan(resolve_model(args.model), args.bpw, args.tp_max, args.ignore)
    rows = plan.table()
    width = max(len(row[0]) for row in rows)
    for name, count, shape, decision, megabytes in rows:
        print(f"{name:{width}} {count:5} x {shape:>13}  {decision:24} {megabytes:10.2f} MB")
    tokens = NUM_WINDOWS * WINDOW_TOKENS if _calibration(args.calibration) else 0
    print(f"{plan.num_quantized_weights / 1e6:.1f} M weights quantised at {plan.effective_bits_per_weight:.3f} effective bits per weight")
    print(f"disk: {plan.output_bytes / 1e6:.1f} MB in {len(plan.shards)} shards, instead of {plan.source_bytes / 1e6:.1f} MB")
    print(f"peak memory while quantising: about {plan.peak_memory_bytes(tokens) / 2**30:.1f} GiB")
    served = ", ".join(map(str, plan.tensor_parallel_sizes))
    print(f"tensor-parallel sizes up to {args.tp_max} that can serve the result: {served}")


def _inspect(args: argparse.Namespace) -> None:
    from offline_quantize.inspection import inspect

    print(inspect(args.checkpoint))


def _verify(args: argparse.Namespace) -> None:
    from offline_quantize.inspection import verify

    print(verify(args.checkpoint))


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with a message on standard error when it cannot be carried out."""
    args = _parser().parse_args(argv)
    run = {"quantize": _quantize, "plan": _plan, "inspect": _inspect, "verify": _verify}[args.command]
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (QuantizeError, ValueError, OSError) as error:  # ValueError: a bad tensor; OSError: a full disk
        print(f"qamw: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qamw: interrupted; --resume continues after the last finished shard", file=sys.stderr)
        return 130
    return 0
