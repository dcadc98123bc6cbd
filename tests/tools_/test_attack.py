"""``make attack``: its judges judge, and a cross-section of its attacks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qamw_kernels.errors import FileError
from qamw_kernels.format.manifest import MANIFEST
from tests.helpers.checkpoints import change_quantization_config, change_tensor, files_of
from tests.helpers.models import copy_model
from tools.attack.mutations import QUANTIZED
from tools.attack.reading import digest, may_be_meant, read_content, try_to_read
from tools.attack.run import KINDS, Attack, Victim, try_doors
from tools.attack.table import faults_of, table
from tools.attack.verdicts import Delivered, Verdict

GOLDEN = Path(__file__).parents[1] / "golden" / "quantized"
LAYER = "model.layers.0.mlp.down_proj"
MODELS = ("llama", "mixtral")


def test_cross_section() -> None:
    """In a process of its own: it copies itself, which a process with threads should not."""
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "tools.attack", "--mutations", "60", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 mutations" in done.stdout and "0 silent, 0 unclear, 0 hanging" in done.stdout


# --- every verdict can come out


def accepts_everything(directory: Path) -> Delivered:
    return digest(read_content(directory).tensors, {})


def names_the_file(directory: Path) -> Delivered:
    raise FileError(f"{directory / MANIFEST}: damaged")


def names_nothing(_: Path) -> Delivered:
    raise FileError("damaged")


def traceback(_: Path) -> Delivered:
    raise KeyError("weight_map")


def dies(_: Path) -> Delivered:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hangs(_: Path) -> Delivered:
    while True:
        time.sleep(1)


def victim_with(**doors: Callable[[Path], Delivered]) -> Victim:
    """The golden checkpoint behind these doors."""
    expected = accepts_everything(GOLDEN)
    return Victim(GOLDEN, read_content(GOLDEN), dict.fromkeys(doors, expected), doors)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A row norm is another number, which it may be."""
    directory = copy_model(GOLDEN, tmp_path / "damaged")
    change_tensor(directory, f"{LAYER}.row_norms", lambda norms: norms * 2)
    return directory


def test_what_is_accepted_in_silence_is_noticed(damaged: Path) -> None:
    victim = victim_with(door=accepts_everything)
    (outcome,) = try_doors(GOLDEN, victim, meant=False, limit=60)
    assert outcome.verdict is Verdict.EQUAL
    (outcome,) = try_doors(damaged, victim, meant=True, limit=60)
    assert outcome.verdict is Verdict.OTHER
    (outcome,) = try_doors(damaged, victim, meant=False, limit=60)
    assert outcome.verdict is Verdict.SILENT
    assert outcome.detail == f"1 differ, the first is {LAYER}.row_norms"


def test_what_ends_a_process_is_noticed_and_the_next_door_is_tried(damaged: Path) -> None:
    victim = victim_with(a=traceback, b=dies, c=names_nothing, d=hangs, e=names_the_file)
    outcomes = try_doors(damaged, victim, meant=True, limit=2)
    assert [(o.door, o.verdict, o.detail.partition("/")[0]) for o in outcomes] == [
        ("a", Verdict.UNCLEAR, "KeyError: 'weight_map'"),
        ("b", Verdict.UNCLEAR, "the process ended: SIGKILL"),
        ("c", Verdict.UNCLEAR, "damaged"),
        ("d", Verdict.HANGING, "more than 2 s"),
        ("e", Verdict.REFUSED, ""),
    ]


def test_faults_are_counted_and_can_be_repeated(damaged: Path) -> None:
    attack = Attack.of(3, 7, MODELS)
    victim = victim_with(verify=accepts_everything, plugin=names_the_file)
    result = (attack, "changed", try_doors(damaged, victim, meant=False, limit=60))
    (fault,) = faults_of(result, MODELS)
    assert "python -m tools.attack --seed 3 --model llama --model mixtral --only 7" in fault
    assert "1 mutations, 2 doors tried: 1 silent, 0 unclear, 0 hanging" in table([result])


# --- what may be meant


def index_bit(directory: Path) -> None:
    change_tensor(directory, f"{LAYER}.qweight", lambda planes: planes ^ 4)


def plain_value(directory: Path) -> None:
    change_tensor(directory, "model.norm.weight", lambda norm: norm + 1)


def rotation(directory: Path) -> None:
    change_quantization_config(directory, rotation_block_sizes={"128": 64, "192": 32})


def not_finite(directory: Path) -> None:
    change_tensor(directory, "model.norm.weight", lambda norm: norm * float("nan"))


def negative_norm(directory: Path) -> None:
    change_tensor(directory, f"{LAYER}.row_norms", torch.neg)


def scales_that_differ(directory: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.input_scales"
    change_tensor(directory, name, lambda scales: scales * 2)


def lost_tensor(directory: Path) -> None:
    change_tensor(directory, "model.norm.weight", lambda _: None)


def other_shape(directory: Path) -> None:
    change_tensor(directory, "model.norm.weight", lambda norm: norm[:64])


def impossible_rotation(directory: Path) -> None:
    change_quantization_config(directory, rotation_block_sizes={"128": 64, "192": 128})


def other_rate(directory: Path) -> None:
    change_quantization_config(directory, index_bits=12)


def width(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 64}))


def fifo(directory: Path) -> None:
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")


MEANT = (index_bit, plain_value, rotation)
NOT_MEANT = (
    *(not_finite, negative_norm, scales_that_differ, lost_tensor, other_shape),
    *(impossible_rotation, other_rate, width, fifo),
)


@pytest.mark.parametrize("change", [*MEANT, *NOT_MEANT], ids=lambda change: change.__name__)
def test_what_may_be_meant(change: Callable[[Path], None], tmp_path: Path) -> None:
    """Only such a change may be accepted, if the manifest was made after it."""
    directory = copy_model(GOLDEN, tmp_path / "changed")
    change(directory)
    meant = may_be_meant(read_content(GOLDEN), try_to_read(directory))
    assert meant == (change in MEANT)


# --- the same seed, the same damage


def test_attacks_follow_from_seed_and_number(tmp_path: Path) -> None:
    number_of = {kind: number for number, kind in enumerate(KINDS)}
    for kind in QUANTIZED.keys() - {"places"}:  # those cannot be read back
        first, second, *others = (
            _files_after(seed, number_of[kind], tmp_path / f"{kind} {number}")
            for number, seed in enumerate((0, 0, 1, 2, 3))
        )
        assert first == second and first != files_of(GOLDEN), kind
        assert any(first != other for other in others), kind


def _files_after(seed: int, number: int, directory: Path) -> dict[str, bytes]:
    copy_model(GOLDEN, directory)
    assert Attack.of(seed, number, MODELS).damage(directory)
    return files_of(directory)


def test_every_kind_meets_every_model() -> None:
    attacks = [Attack.of(0, number, MODELS) for number in range(2 * len(KINDS))]
    assert len({(attack.kind, attack.model) for attack in attacks}) == len(attacks)
    signed = {
        attack.kind for attack in (Attack.of(0, n, MODELS) for n in range(500)) if attack.signed
    }
    assert signed == QUANTIZED.keys() - {"manifests"}
