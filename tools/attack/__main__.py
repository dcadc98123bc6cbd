"""``python -m tools.attack``: hundreds of damaged checkpoints, and what every door did with them.

Exit status 0 only if none of them was accepted in silence, ended in a traceback, or hung.
"""

import argparse
import os
import sys
import tempfile

# Before torch and vLLM are imported.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # a process with threads cannot be copied
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "CRITICAL",
    }
)

from tools.attack.models import ARCHITECTURES
from tools.attack.run import Attack, carry_out, victims_of
from tools.attack.table import Result, faults_of, table


def main(argv: list[str] | None = None) -> int:
    """Attack, and print what happened."""
    args = _parse(argv)
    models = tuple(args.model or ARCHITECTURES)
    numbers = args.only or range(args.mutations)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="qamw-attack-cache-") as cache:
        os.environ["VLLM_CACHE_ROOT"] = cache
        with victims_of(models) as victims:
            for attack in (Attack.of(args.seed, number, models) for number in numbers):
                line, outcomes = carry_out(attack, victims, args.limit)
                if args.only:
                    print(f"{attack.number}: {attack.model}, {attack.kind}: {line}")
                    print(
                        *(f"  {o.door}: {o.verdict.value}. {o.detail}" for o in outcomes), sep="\n"
                    )
                results.append((attack, line, outcomes))
                print(*faults_of(results[-1], models), sep="\n", end="", flush=True)
    print(table(results))
    return int(any(o.verdict.is_fault for _, _, outcomes in results for o in outcomes))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.attack", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--mutations", type=int, default=510, help="how many (default 510)")
    add("--only", type=int, action="append", metavar="NUMBER", help="repeat one, in words")
    add("--model", action="append", choices=list(ARCHITECTURES), help="default: all of them")
    add("--limit", type=float, default=300, help="seconds that a door may take (default 300)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
