"""What happened, for people: a table of counts, and how to repeat what should not have happened."""

from collections import Counter
from collections.abc import Sequence

from tools.attack.run import KINDS, Attack
from tools.attack.verdicts import Outcome, Verdict

Result = tuple[Attack, str, list[Outcome]]
"""An attack, what was done in words, and what every door did."""

_DETAIL = 600  # characters shown


def faults_of(result: Result, models: Sequence[str]) -> list[str]:
    """Lines about every outcome that must not happen, each with the command that repeats it."""
    attack, line, outcomes = result
    chosen = " ".join(f"--model {model}" for model in models)
    command = f"python -m tools.attack --seed {attack.seed} {chosen} --only {attack.number}"
    return [
        f"{outcome.verdict.value}: {outcome.door}, {attack.model}, {attack.kind}: {line}\n"
        f"    {outcome.detail[:_DETAIL]!r}\n    {command}\n"
        for outcome in outcomes
        if outcome.verdict.is_fault
    ]


def table(results: Sequence[Result]) -> str:
    """Counts of verdicts, by kind of damage and by door."""
    verdicts = [verdict.value for verdict in Verdict]
    counts: dict[tuple[str, str], Counter[str]] = {}
    for attack, _, outcomes in results:
        for outcome in outcomes:
            for row in ((attack.kind, outcome.door), ("all", outcome.door)):
                counts.setdefault(row, Counter())[outcome.verdict.value] += 1
    order = [*KINDS, "all"]
    lines = [f"{'damage':20} {'door':10} " + " ".join(f"{v:>8}" for v in verdicts)]
    for (kind, door), found in sorted(counts.items(), key=lambda item: order.index(item[0][0])):
        numbers = " ".join(f"{found[v] or '':>8}" for v in verdicts)
        lines.append(f"{kind:20} {door:10} {numbers}")
    totals = Counter(o.verdict.value for _, _, outcomes in results for o in outcomes)
    bad = ", ".join(f"{totals[v.value]} {v.value}" for v in Verdict if v.is_fault)
    lines.append(f"{len(results)} mutations, {totals.total()} doors tried: {bad}")
    return "\n".join(lines)
