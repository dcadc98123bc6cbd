"""A plain model and a QAM-W checkpoint served side by side under the same load.

``make bench-serve``, or ``python -m benchmarks.serving.load MODEL CKPT``. Both servers run at once
and are loaded in turn, by ``vllm bench serve`` with random prompts, so that a noisy machine is as
noisy for both. Rows go to a JSON file with a description of the machine, and to a plot.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.server import ENVIRONMENT, VLLM, Server, serve

RESULTS = Path(__file__).with_name("results")
FIGURES = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "time to first token, ms",
    "median_tpot_ms": "time per output token, ms",
    "memory_gib": "memory, GiB",
}
Figures = dict[str, float]
"""A value for each of FIGURES."""


def memory_gib(server: Server) -> float:
    """On a GPU what vLLM logs for the weights, because it takes all other memory too; else PSS."""
    if torch.cuda.is_available():
        logged = re.findall(r"Model loading took ([\d.]+) GiB", server.log.read_text())
        if logged:
            return float(logged[-1])
    return server.memory() / 2**30


def load(
    server: Server,
    name: str,
    tokenizer: Path,
    clients: int,
    seed: int,
    args: argparse.Namespace,
) -> Figures:
    """The figures of one round in which ``clients`` ask at once.

    Raises:
        RuntimeError: the load generator failed, or a request was not answered.
    """
    num_requests = args.requests * clients
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.address),
            *("--model", name, "--tokenizer", tokenizer, "--dataset-name", "random"),
            *("--random-input-len", str(args.input_len)),
            *("--random-output-len", str(args.output_len)),
            *("--ignore-eos", "--num-prompts", str(num_requests)),
            *("--max-concurrency", str(clients), "--seed", str(seed), "--disable-tqdm"),
            *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
        ]
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        if process.returncode:
            raise RuntimeError(f"vllm bench serve: {(process.stdout + process.stderr)[-5000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != num_requests:
        raise RuntimeError(
            f"{name}: {result['completed']} of {num_requests} requests were answered; "
            f"see {server.log}"
        )
    figures = {figure: result[figure] for figure in FIGURES if figure in result}
    return figures | {"memory_gib": memory_gib(server)}


def measure(
    servers: dict[str, Server],
    clients: int,
    args: argparse.Namespace,
) -> dict[str, Figures]:
    """The medians over the rounds of every server, which are loaded in turn."""
    rounds: dict[str, list[Figures]] = {name: [] for name in servers}
    for number in range(args.rounds + 1):  # the first round warms up
        seed = 1000 * clients + number  # never the same prompts
        for name, server in servers.items():
            rounds[name].append(load(server, name, args.model, clients, seed, args))
    return {
        name: {key: statistics.median(figures[key] for figures in measured[1:]) for key in FIGURES}
        for name, measured in rounds.items()
    }


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """One panel for every figure, against the number of clients."""
    from matplotlib.figure import Figure

    clients = sorted({row["clients"] for row in rows})
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, FIGURES.items(), strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [row for row in rows if row["name"] == name]
            axes.plot(
                [row["clients"] for row in own],
                [row[key] for row in own],
                marker="o",
                label=name,
            )
        top = 1.2 * max(row[key] for row in rows)
        axes.set(xlabel="clients at once", ylabel=label, xscale="log", ylim=(0, top))
        axes.set_xticks(clients, [str(n) for n in clients])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def result_of(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with what was loaded, how, and where."""
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "model": args.model.name,
        "checkpoint": args.checkpoint.name,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "requests_per_client": args.requests,
        "rounds": args.rounds,
        "options": args.options,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cores,
        "versions": {p: version(p) for p in ("vllm", "torch", "triton", "qamw-vllm")},
        "rows": rows,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2, help="of every client in a round")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="for each model in turn; medians are reported",
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "serve.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "serve.png")
    parser.add_argument(
        "--options",
        default="",
        help="more options of vllm serve, such as '--gpu-memory-utilization 0.4'",
    )
    return parser


def main() -> None:
    args = make_parser().parse_args()
    options = [
        *("--max-model-len", str(args.input_len + args.output_len + 64)),
        *("--max-num-seqs", str(max(args.clients)), *args.options.split()),
    ]
    rows = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        servers = {}
        for name, directory in {"bf16": args.model, "QAM-W": args.checkpoint}.items():
            log = Path(folder) / f"{name}.log"
            server = serve(directory, log, "--served-model-name", name, *options)
            servers[name] = stack.enter_context(server)
        for clients in args.clients:
            for name, medians in measure(servers, clients, args).items():
                rows.append({"name": name, "clients": clients, **medians})
                figures = (f"{label} {medians[key]:.2f}" for key, label in FIGURES.items())
                print(f"{name:6} {clients:3} clients: {', '.join(figures)}", flush=True)
    args.json.write_text(json.dumps(result_of(args, rows), indent=1) + "\n")
    plot(args.plot, rows)


if __name__ == "__main__":
    main()
