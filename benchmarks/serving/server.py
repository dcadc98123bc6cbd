"""``vllm serve`` as a process of its own, for the serving benchmark, the soak test and tests."""

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
SECONDS_TO_STOP = 60  # after which the server is killed


@dataclass
class Server:
    """A running server: its address, its process, and the file with what it prints."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return httpx.get(f"{self.address}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def memory(self) -> int:
        """Bytes in memory of the server and all its children; what they share is counted once."""
        processes = [psutil.Process(self.process.pid)]
        processes += processes[0].children(recursive=True)
        return sum(p.memory_full_info().pss for p in processes if p.is_running())

    def metric(self, name: str) -> float:
        """A gauge or counter of Prometheus, summed over its labels.

        Raises:
            LookupError: the server has no such metric.
        """
        lines = httpx.get(f"{self.address}/metrics", timeout=30).text.splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0] == name]
        if not values:
            raise LookupError(f"{self.address}/metrics has no {name}")
        return sum(values)

    def wait_until_ready(self, timeout: float) -> None:
        """Return once the server answers.

        Raises:
            RuntimeError: the server ended, or was not ready within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                command = " ".join(map(str, self.process.args))  # type: ignore[arg-type]  # a list
                raise RuntimeError(f"{command}: not ready\n{self.log.read_text()[-10000:]}")
            time.sleep(1)

    def stop(self) -> None:
        """End the server and its children."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the session that serve() started


@contextmanager
def serve(
    model: Path,
    log: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> Iterator[Server]:
    """``vllm serve MODEL OPTIONS`` on a free port of this machine, until the block ends.

    Args:
        log: the file for what the server prints.
        environment: instead of that of this process with ENVIRONMENT.
        timeout: seconds that the server may take to start.
    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The `vllm` command of the CPU build cannot start without this metadata.
        subprocess.run([sys.executable, "-m", "qamw_vllm.cpu_metadata"], check=True)
    host, port = "127.0.0.1", _free_port()
    command = [str(VLLM), "serve", str(model), "--host", host, "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT} if environment is None else dict(environment),
        )
        server = Server(f"http://{host}:{port}", process, log)
        try:
            server.wait_until_ready(timeout)
            yield server
        finally:
            server.stop()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
