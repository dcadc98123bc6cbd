"""The command line: ``qamw``, the same as ``python -m offline_quantize``."""

import argparse
import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offline_quantize import commands
from offline_quantize.errors import (
    EndedElsewhereError,
    Option,
    QuantizeError,
    is_out_of_memory,
    printable,
    shortened,
)
from offline_quantize.evaluation.conventions import BOS_RULE, CONVENTIONS
from qamw_kernels.errors import QamwError
from qamw_kernels.format.codebook import CODES, PLAIN
from qamw_kernels.format.defaults import BITS_PER_WEIGHT, TP_MAX

OF_EXTRAS = ("filelock", "matplotlib", "tqdm", "transformers")
"""Modules that the extra ``quantize`` brings; serving needs none of them."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success; 2, with a message on standard error, where the command cannot be carried out;
        130 where it was interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    args.command_line = ["qamw", *argv]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals without a plus-minus sign
    try:
        args.run(args)
        print(end="", flush=True)  # also if standard output is closed
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except EndedElsewhereError as error:  # another process prints the message
        if args.debug:
            traceback.print_exception(error)
        return 2
    except KeyboardInterrupt:
        print(f"qamw: interrupted{commands.kept_after_interruption(args)}", file=sys.stderr)
        return 130
    except (QamwError, OSError) as error:  # everything else is a bug, with its traceback
        if args.debug:
            traceback.print_exc()
        message = error.spelled(spell_flag) if isinstance(error, QuantizeError) else error
        print(printable(f"qamw: {message}"), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if args.debug or error.name not in OF_EXTRAS:
            raise
        print(f"qamw: no module {error.name}; run: pip install '.[quantize]'", file=sys.stderr)
        return 2
    except Exception as error:
        if args.debug or not is_out_of_memory(error):
            raise
        details = shortened(error) or "none is left for this process"  # MemoryError has no text
        print(printable(f"qamw: not enough memory: {details}"), file=sys.stderr)
        return 2
    return 0


def spell_flag(option: Option) -> str:
    """How a user passes a parameter on the command line: ``--bpw 7``."""
    flag = f"--{option.name.replace('_', '-')}"
    if not option.value or option.value[0] is True:
        return flag
    values = option.value[0] if isinstance(option.value[0], list | tuple) else option.value
    return " ".join(f"{flag} {_argument(value)}" for value in values)


def _argument(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``qamw``; ``run`` of its result is the command's function."""
    parser = argparse.ArgumentParser(
        prog="qamw", description="Quantize Hugging Face checkpoints to QAM-W, for vLLM."
    )
    parser.add_argument("--version", action="version", version=f"qamw-vllm {version('qamw-vllm')}")
    _add_debug(parser, default=False)
    subparsers = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=text)
        command.set_defaults(run=run)
        _add_debug(command, default=argparse.SUPPRESS)  # keeps a --debug before the command
        return command

    quantize = add("quantize", commands.quantize, "quantize MODEL into the new directory OUT")
    _add_model_options(quantize)
    _add_quantize_options(quantize)
    plan = add("plan", commands.plan, "show what quantize would do; reads headers only")
    _add_model_options(plan)
    plan.add_argument(
        "--processes",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="number of processes that torchrun will start (default 1)",
    )
    _add_dequantize_options(
        add(
            "dequantize",
            commands.dequantize,
            "decode CKPT to a plain checkpoint in the new directory OUT",
        )
    )
    _add_checkpoint(
        add("inspect", commands.inspect, "show what is inside a quantized checkpoint, per layer")
    )
    _add_verify_options(
        add(
            "verify",
            commands.verify,
            "check every byte against the manifest, every tensor against format and architecture",
        )
    )
    _add_eval_options(
        add(
            "eval",
            commands.evaluate,
            "measure perplexity and KL divergence against the original model",
        )
    )
    add("env", commands.environment, "show versions, devices and the plugin, for a bug report")
    return parser


def _add_debug(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument(
        "--debug",
        action="store_true",
        default=default,
        help="show where in the code an error comes from",
    )


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=Path)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", metavar="OUT", type=Path, help="a new or empty directory")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")


def _add_model_options(command: argparse.ArgumentParser) -> None:
    """What ``quantize`` and ``plan`` have in common."""
    add = command.add_argument
    add(
        "model",
        metavar="MODEL",
        help="Hugging Face directory, or a hub id where there is a network",
    )
    add(
        "--bpw",
        type=float,
        default=BITS_PER_WEIGHT,
        help=f"bits per weight, 3 to 6 (default {BITS_PER_WEIGHT:g}): 3, 3.5 ... 6 count only the "
        "indices, on average; any other value counts everything that is stored for the quantized "
        "layers",
    )
    _add_calibration_options(command)
    add(
        "--tp-max",
        type=int,
        default=TP_MAX,
        help=f"largest tensor-parallel size to prepare for (default {TP_MAX})",
    )
    add(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave linear layers that match this glob pattern as they are; may be repeated",
    )
    add(
        "--allow-partial",
        action="store_true",
        help="continue even if more than a tenth of the decoder's weights cannot be quantized; "
        "they stay as they are",
    )
    add(
        "--quantize-lm-head",
        action="store_true",
        help="also quantize the head that makes logits, at 6 bits per weight; a head that shares "
        "its weight with the embeddings gets a weight of its own",
    )


def _add_calibration_options(command: argparse.ArgumentParser) -> None:
    """The calibration text, and how weights are encoded with it."""
    add = command.add_argument
    add(
        "--calibration",
        default="default",
        metavar="FILE|none",
        help="UTF-8 text similar to what the model will read, 16 thousand tokens or more; .jsonl "
        'has a {"text": ...} or a chat, {"messages": ...}, on each line (default: articles, '
        "programs and chats that come with qamw); none: less time, larger errors",
    )
    add(
        "--calibration-tokens",
        type=_at_least(1),
        metavar="N",
        help="how many tokens of the text are read, in windows of 512; more take more time "
        "(default: 3 for each input of the widest layer, at least 16384, twice as many with "
        "--effort best, at most what the text has)",
    )
    add(
        "--effort",
        choices=["fast", "normal", "best"],
        default="normal",
        help="how long to look for good codings, of the same size and speed: fast is --rates "
        "uniform in half the time, best is --encoder beam with twice the calibration tokens, in "
        "three times the time (default normal)",
    )
    add(
        "--encoder",
        choices=["feedback", "beam", "nearest"],
        help="feedback: each pair compensates for the errors of the pairs before it (default with "
        "calibration); beam: also keeps the best of several codings of a row; nearest: neither",
    )
    add(
        "--code",
        choices=list(CODES),
        default=PLAIN,
        help="trellis: about a quarter less squared error from as many bits, in more time; needs a "
        f"qamw that reads format version 2 (default {PLAIN})",
    )
    add(
        "--rates",
        choices=["mixed", "uniform"],
        help="mixed: layers whose errors cost more get more bits, and tokens whose errors cost "
        "more count more, as measured by a forward and a backward pass (default with calibration); "
        "uniform: the same for all, in half the time",
    )


def _add_quantize_options(command: argparse.ArgumentParser) -> None:
    _add_out(command)
    _add_device(command)
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run of the same request",
    )


def _add_dequantize_options(command: argparse.ArgumentParser) -> None:
    _add_checkpoint(command)
    _add_out(command)
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="dtype for the weights that were quantized (default bfloat16)",
    )


def _add_verify_options(command: argparse.ArgumentParser) -> None:
    _add_checkpoint(command)
    command.add_argument(
        "--sign",
        action="store_true",
        help="write a new manifest after you changed files on purpose, if all else is correct",
    )


def _add_eval_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "checkpoints",
        metavar="CKPT",
        nargs="+",
        help="what to measure: QAM-W or plain, directory or hub id",
    )
    add("--reference", metavar="MODEL", required=True, help="the original model")
    add(
        "--text",
        metavar="FILE",
        type=Path,
        required=True,
        help="the raw WikiText test split, or any UTF-8 text",
    )
    add(
        "--convention",
        action="append",
        choices=list(CONVENTIONS),
        metavar="NAME",
        help=f"{', '.join(CONVENTIONS)}; may be repeated (default all). KL is measured in the "
        "first",
    )
    add(
        "--windows",
        type=_at_least(1),
        metavar="N",
        help="at most this many windows per convention (lm-eval: whole pages)",
    )
    add("--bos", choices=["auto", "yes", "no"], default="auto", help=BOS_RULE)
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="dtype of the models; logits are always float32",
    )
    add(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="what runs CKPT: transformers with decoded weights, or vLLM as it serves it",
    )
    _add_device(command)
    _add_eval_results(command)


def _add_eval_results(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--noise-windows",
        type=_at_least(0),
        default=2,
        metavar="N",
        help="windows for the noise floor of bfloat16 (default 2, 0: none)",
    )
    add(
        "--json",
        metavar="FILE",
        type=Path,
        help="write all figures, and what they were measured with",
    )
    add(
        "--plot",
        metavar="FILE",
        type=Path,
        help="write a PNG: distribution of KL over tokens, and by window",
    )


def _at_least(minimum: int) -> Callable[[str], int]:
    """A type for argparse: integers of at least ``minimum``."""

    def count(value: str) -> int:
        if (number := int(value)) < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {value}")
        return number

    return count
