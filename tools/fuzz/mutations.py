"""Inputs that are JSON often enough to get far into a parser; the first byte names the target."""

import json
import random
from collections.abc import Collection

from tools.attack.json_values import change_somewhere
from tools.fuzz.targets import TARGETS

NAMES = tuple(TARGETS)


def seeds(names: Collection[str] = NAMES) -> list[bytes]:
    """For each of these targets, an input that it accepts."""
    return [
        bytes([number]) + json.dumps(TARGETS[name].seed).encode()
        for number, name in enumerate(NAMES)
        if name in names
    ]


def parted(data: bytes) -> tuple[str, bytes]:
    """The target that an input is for, and what it is to read."""
    return NAMES[data[0] % len(NAMES)] if data else NAMES[0], data[1:]


def change(data: bytes, rng: random.Random) -> bytes:
    """Another input for the same target, with changes in its JSON object, or in its bytes.

    Args:
        data: not empty.
    """
    try:
        value = json.loads(data[1:])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or rng.random() < 0.1:
        return data[:1] + _change_bytes(bytearray(data[1:]), rng)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        change_somewhere(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.1:  # a key that is there twice
        text = f"{text[:-1]}{', ' if value else ''}{text[1:]}"
    return data[:1] + text.encode()


def _change_bytes(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    how = rng.choice(["flip", "cut", "insert", "twice"])
    if how == "flip" and start < len(content):
        content[start] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[start : start + rng.choice([1, 1, 8, 64])]
    elif how == "insert":
        content[start:start] = rng.choice(
            [b"\xff", b'"', b"{", b"[" * 5000, b"9" * 5000, b"\\ud800"]
        )
    else:
        content[start:start] = content[start : start + rng.choice([8, 64])]
    return bytes(content)
