"""``vllm serve`` as a process of its own, for the tests, the serving benchmark and the soak test."""

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

VLLM = Path(sys.executable).with_name("vllm")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass
class Server:
    """A running server: its address, its process, and the file with what it prints."""

    address: str
    process: subprocess.Popen
    log: Path

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def memory(self) -> int:
        """Bytes in memory of the server and all its children, what they share counted once."""
        processes = [psutil.Process(self.process.pid)]
        processes += processes[0].children(recursive=True)
        return sum(p.memory_full_info().pss for p in processes if p.is_running())

    def metric(self, name: str) -> float:
        """A gauge or counter of Prometheus, summed over its labels."""
        lines = httpx.get(f"{self.address}/metrics", timeout=30).text.splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0] == name]
        if not values:
            raise LookupError(f"{self.address}/metrics has no {name}")
        return sum(values)


@contextmanager
def serve(model: Path, log: Path, *options: str, environment: Mapping[str, str] | None = None, timeout: float = 600) -> Iterator[Server]:
    """``vllm serve MODEL OPTIONS`` on a free port of this machine, until the block ends.

    Args:
        environment: instead of that of this process with ENVIRONMENT.
    Raises:
        RuntimeError: the server ended, or was not ready within ``timeout`` seconds.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # the `vllm` command of the CPU build needs it
        subprocess.run([sys.executable, "-m", "qamw_vllm.cpu_metadata"], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(VLLM), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, **ENVIRONMENT} if environment is None else dict(environment))
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            deadline = time.monotonic() + timeout
            while not server.healthy():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{' '.join(command)}: not ready\n{log.read_text()[-10000:]}")
                time.sleep(1)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)  # the session that was started above
