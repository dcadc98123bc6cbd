"""``python -m tools.fuzz``: coverage-guided fuzzing of the parsers.

Needs atheris, ``pip install '.[fuzz]'``. Exit status 0 only if every input was accepted or refused
by an error of the project's. The input of a fault is written to a file, and
``python -m tools.fuzz FILE`` repeats it.
"""

import argparse
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

# Before torch and transformers are imported.
os.environ.update(
    {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
)

with atheris.instrument_imports(include=["json", "qamw_kernels", "offline_quantize"]):
    from tools.fuzz.mutations import NAMES, change, parted, seeds
    from tools.fuzz.targets import TARGETS, try_target

HANGING = 120  # seconds
MAX_MEGABYTES = 8192
MAX_LENGTH = 2**16  # of an input


def main() -> None:
    """Fuzz; does not return."""
    args = _parse()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="qamw-fuzz-"))
    for name in (*NAMES, "corpus"):
        (folder / name).mkdir()
    names = args.target or [name for name, target in TARGETS.items() if not target.slow]
    for number, seed in enumerate(seeds(names)):
        (folder / "corpus" / str(number)).write_bytes(seed)
    findings = args.findings.absolute()
    findings.mkdir(parents=True, exist_ok=True)

    def test_one_input(data: bytes) -> None:
        name, content = parted(data)
        try_target(name, content, folder / name)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return change(data or bytes(1), random.Random(seed))[:max_size]

    options = [
        f"-max_total_time={args.seconds}",
        f"-timeout={HANGING}",
        f"-report_slow_units={HANGING}",
        f"-rss_limit_mb={MAX_MEGABYTES}",
        f"-max_len={MAX_LENGTH}",
        f"-artifact_prefix={findings}/",
        f"-seed={args.seed}",
    ]
    inputs = [str(path) for path in args.input] or [str(folder / "corpus")]
    atheris.Setup([sys.argv[0], *options, *inputs], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    add = parser.add_argument
    add("input", nargs="*", type=Path, help="read these only, instead of making new ones")
    add("--target", action="append", choices=NAMES, help="default: all that are quick")
    add("--seconds", type=int, default=60, help="how long (default 60)")
    add("--seed", type=int, default=0, help="of random numbers; 0 for another one every time")
    add("--findings", type=Path, default=Path("build/fuzz"), help="a folder for faults")
    return parser.parse_args()


if __name__ == "__main__":
    main()
