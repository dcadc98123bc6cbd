"""Values that JSON can have and that nobody expects."""

import copy
import random
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 64, 128, 2**31, 2**63, 10**6, 10**30, 0.5, 64.0, 1e308),
    *("", "x", "64", "1_28", " 128 ", "../..", "\x1b[2J", [], {}, [[]], {"": ""}, ["x"]),
)


def numbers_and_others(rng: random.Random) -> Any:
    """A random one of these values, as a copy of its own."""
    return copy.deepcopy(rng.choice(_VALUES))


def change_somewhere(value: dict[str, Any], rng: random.Random) -> str:
    """Change one thing in a JSON object, at any depth; returns what was done.

    A value becomes another one, is removed, doubled or put under another key.
    """
    path, here = [], value
    while True:
        key = rng.choice(sorted(here)) if here else ""
        path.append(key)
        if not isinstance(here.get(key), dict) or not here[key] or rng.random() < 0.2:
            break
        here = here[key]
    how = rng.choice(["value", "value", "number", "removed", "other key", "list", "new key"])
    old, where = here.get(key), "/".join(path)
    if how == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        here[key] = rng.choice([old + 1, old - 1, old * 2, old / 2, -old, float(old), str(old)])
    elif how == "removed":
        here.pop(key, None)
    elif how == "other key":
        here[rng.choice([f"+{key}", f" {key} ", f"{key}x", key.upper()])] = here.pop(key, None)
    elif how == "list" and isinstance(old, list) and old:
        here[key] = rng.choice([old[1:], old * 2, [*old, "x"], [*old, 5], [*old, old[0]]])
    elif how == "new key":
        here[rng.choice(["x", "", "64", "+64", "quantization_config"])] = numbers_and_others(rng)
    else:
        here[key] = numbers_and_others(rng)
    return f"{where}: {how}, {old!r:.60} -> {here.get(key)!r:.60}"
