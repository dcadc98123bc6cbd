"""How the time of ``qamw quantize`` falls with the number of processes, each with one thread.

    python -m benchmarks.processes.scaling MODEL [--processes 1 2] [-- OPTIONS OF QUANTIZE]

Run it on a machine that does nothing else. Starting Python and its libraries is timed by itself, as
it is the same for every model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds(processes: int, arguments: list[str]) -> float:
    """How long a command of ``qamw`` takes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "offline_quantize", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print a line for every number of processes."""
    parser = argparse.ArgumentParser(description="time qamw quantize in several processes")
    parser.add_argument("model")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("options", nargs="*", help="of qamw quantize, after --")
    args = parser.parse_args()
    first = 0.0
    for processes in args.processes:
        # Plans are made alike in all processes, with the same libraries.
        start = seconds(processes, ["plan", args.model])
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "out")
            whole = seconds(processes, ["quantize", args.model, out, *args.options])
        first = first or whole - start
        print(
            f"{processes} processes: {whole - start:.1f} s and {start:.1f} s to start, "
            f"{first / (whole - start):.2f} times as fast as the first line",
            flush=True,
        )


if __name__ == "__main__":
    main()
