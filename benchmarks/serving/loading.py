"""What it costs to check a checkpoint while it is loaded.

``python -m benchmarks.serving.loading CKPT``. The model is loaded again and again, in turn without
the check, with a check that hashes every file, and with one that knows them from before. Each time
a process does it that was forked from this one, which has imported vLLM: models do not pile up. All
files are read once before, so they come from the page cache. The line that is printed last has
medians, in seconds.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.serving.server import ENVIRONMENT
from qamw_vllm.loading.manifest import VERIFY_VARIABLE

WAYS = ("unchecked", "hashed", "known")


def start_one_rank(folder: Path) -> None:
    """What a worker of vLLM does before it loads a model."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder / 'rendezvous'}", 0, "gloo")
        initialize_model_parallel()


def load(checkpoint: Path) -> float:
    """Seconds from the arguments of an engine to a model that is ready to run, in a new process."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_load, (checkpoint,))


def _load(checkpoint: Path) -> float:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    with tempfile.TemporaryDirectory() as folder:
        start_one_rank(Path(folder))
    start = time.perf_counter()
    arguments = EngineArgs(
        model=str(checkpoint),
        quantization="qamw",
        enforce_eager=True,
        max_model_len=256,
        use_tqdm_on_load=False,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        get_model(vllm_config=config)
    return time.perf_counter() - start


def measure(checkpoint: Path, rounds: int, cache: Path) -> dict[str, list[float]]:
    """Seconds that loading took, one figure for each round and way.

    Args:
        cache: vLLM's.
    """
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    load(checkpoint)  # page cache
    for _ in range(rounds):
        for way in WAYS:
            if way == "hashed":
                shutil.rmtree(cache / "qamw", ignore_errors=True)
            os.environ[VERIFY_VARIABLE] = "0" if way == "unchecked" else "1"
            seconds[way].append(load(checkpoint))
            print(f"{way:>9}: {seconds[way][-1]:.2f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a QAM-W checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    # Imported by this process, so that the others need not.
    importlib.import_module("vllm.engine.arg_utils")
    importlib.import_module("vllm.model_executor.model_loader")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_CACHE_ROOT"] = folder
        seconds = measure(args.checkpoint, args.rounds, Path(folder))
    medians = {way: statistics.median(figures) for way, figures in seconds.items()}
    files = args.checkpoint.glob("*.safetensors")
    print(
        f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB of weights: "
        + ", ".join(
            f"{way} {median:.2f} s ({median / medians['unchecked'] - 1:+.1%})"
            for way, median in medians.items()
        )
    )


if __name__ == "__main__":
    main()
