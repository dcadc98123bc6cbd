"""``make fuzz``: its targets accept their seeds, refuse in words, and let faults through."""

import random
from pathlib import Path

import pytest

from tools.fuzz.mutations import NAMES, change, parted, seeds
from tools.fuzz.targets import TARGETS, Target, try_target

CHANGES = {name: 8 if target.slow else 400 for name, target in TARGETS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_accepted_and_what_becomes_of_them_is_no_fault(name: str, tmp_path: Path) -> None:
    (seed,) = seeds([name])
    assert parted(seed)[0] == name and try_target(name, parted(seed)[1], tmp_path) == ""
    data, refused = seed, 0
    for number in range(CHANGES[name]):
        data = change(seed if number % 4 == 0 else data, random.Random(number))
        assert parted(data)[0] == name
        refused += try_target(name, parted(data)[1], tmp_path) != ""
    assert 0 < refused < CHANGES[name]


def test_a_fault_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes, folder: Path) -> None:
        raise KeyError("weight_map")

    monkeypatch.setitem(TARGETS, "index", Target(read, {}))
    with pytest.raises(KeyError):
        try_target("index", b"{}", tmp_path)


def test_changes_follow_from_the_seed_and_differ() -> None:
    for seed in seeds():
        first, second = ({change(seed, random.Random(n)) for n in range(20)} for _ in range(2))
        assert first == second and len(first) > 5
