"""A plain model and a QAM-W checkpoint served side by side under the same load: ``make bench-serve``.

Both servers run at once and are loaded in turn, by ``vllm bench serve`` with random prompts, so that a noisy machine is as noisy for
both. Rows go to a JSON file with the environment, and to a plot.
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

RESULTS = Path(__file__).resolve().parent.parent / "kernels" / "benchmarks" / "results"
FIGURES = {"output_throughput": "tokens/s", "median_ttft_ms": "time to first token, ms", "median_tpot_ms": "time per output token, ms",
           "memory_gib": "memory, GiB"}  # on a GPU what vLLM says of the weights, for it takes the rest too; else the server's processes


def load(server: Server, name: str, tokenizer: Path, clients: int, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Figures of one round of ``clients`` at once."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run([
            VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.address, "--model", name, "--tokenizer", tokenizer,
            "--dataset-name", "random", "--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len),
            "--ignore-eos", "--num-prompts", str(args.requests * clients), "--max-concurrency", str(clients), "--seed", str(seed),
            "--disable-tqdm", "--save-result", "--result-dir", folder, "--result-filename", "result.json",
        ], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        if process.returncode:
            raise RuntimeError(f"vllm bench serve: {(process.stdout + process.stderr)[-5000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != args.requests * clients:
        raise RuntimeError(f"{name}: {result['completed']} of {args.requests * clients} requests were answered; see {server.log}")
    logged = re.findall(r"Model loading took ([\d.]+) GiB", server.log.read_text()) if torch.cuda.is_available() else []
    memory = float(logged[-1]) if logged else server.memory() / 2**30
    return {figure: result[figure] for figure in FIGURES if figure in result} | {"memory_gib": memory}


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """One panel for every figure, against the number of clients."""
    from matplotlib.figure import Figure

    clients = sorted({row["clients"] for row in rows})
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, FIGURES.items(), strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [row for row in rows if row["name"] == name]
            axes.plot([row["clients"] for row in own], [row[key] for row in own], marker="o", label=name)
        axes.set(xlabel="clients at once", ylabel=label, xscale="log", ylim=(0, 1.2 * max(row[key] for row in rows)))
        axes.set_xticks(clients, [str(n) for n in clients])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2, help="of every client in a round")
    parser.add_argument("--rounds", type=int, default=3, help="for each model in turn; medians are reported")
    parser.add_argument("--json", type=Path, default=RESULTS / "serve.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "serve.png")
    parser.add_argument("--options", default="", help="more options of vllm serve, such as '--gpu-memory-utilization 0.4'")
    args = parser.parse_args()

    rows = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        servers = {}
        for name, directory in {"bf16": args.model, "QAM-W": args.checkpoint}.items():
            servers[name] = stack.enter_context(serve(
                directory, Path(folder) / f"{name}.log", "--served-model-name", name, "--max-model-len",
                str(args.input_len + args.output_len + 64), "--max-num-seqs", str(max(args.clients)), *args.options.split()))
        for clients in args.clients:
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
            for seed in range(args.rounds + 1):  # the first warms up
                for name, server in servers.items():
                    rounds[name].append(load(server, name, args.model, clients, args, 1000 * clients + seed))  # never the same prompts
            for name, measured in rounds.items():
                medians = {key: statistics.median(one[key] for one in measured[1:]) for key in FIGURES}
                rows.append({"name": name, "clients": clients, **medians})
                figures = ", ".join(f"{label} {medians[key]:.2f}" for key, label in FIGURES.items())
                print(f"{name:6} {clients:3} clients: {figures}", flush=True)
    cuda = torch.cuda.is_available()
    result = {
        "model": args.model.name, "checkpoint": args.checkpoint.name, "input_len": args.input_len, "output_len": args.output_len,
        "requests_per_client": args.requests, "rounds": args.rounds, "options": args.options,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("vllm", "torch", "triton", "qamw-vllm")}, "rows": rows}
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    plot(args.plot, rows)


if __name__ == "__main__":
    main()
