"""The model of a GPU: its simulator agrees with what can be worked out by hand."""

import dataclasses
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.kernels.model import simulate as simulation
from benchmarks.kernels.model.assumptions import H100, H200, TYPICAL, bf16_seconds
from benchmarks.kernels.model.experts import (
    bf16_grouped_seconds,
    slots_of_experts,
    turns_of_programs,
)
from benchmarks.kernels.model.listing import Instruction, Listing, Loop
from benchmarks.kernels.model.mixtures import MIXTURE
from benchmarks.kernels.model.paths import walk
from benchmarks.kernels.model.simulate import BlockStep, Launch, Outcome, simulate
from benchmarks.kernels.model.trace import NOTHING, Record, Request, Source, Unit, record
from benchmarks.kernels.model.wide import wide_launch
from qamw_kernels.format.codebook import PLAIN, TRELLIS
from qamw_kernels.ops.gluon import table
from qamw_kernels.ops.weight import Rate

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
MACHINE = dataclasses.replace(TYPICAL, program_start=0)
ALL = 132  # multiprocessors


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("model") / "simulator"
    source = Path(simulation.__file__).with_name("simulator.cpp")
    subprocess.run(["g++", "-O2", "-std=c++17", source, "-o", program], check=True)
    return program


@pytest.fixture(autouse=True)
def _use(simulator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "SIMULATOR", simulator)


def instruction(opcode: str, operands: str = "", stall: int = 1, **control: int) -> Instruction:
    barriers = {"write_barrier": 7, "read_barrier": 7, "waits": 0} | control
    return Instruction(opcode, operands, "", stall, **barriers)


def block(*instructions: Instruction, request: Request = NOTHING) -> list[Record]:
    return [record(x, request, MACHINE) for x in instructions]


def cycles(blocks: Sequence[list[Record]], warps: int, programs: int = 1, turns: int = 1) -> float:
    return run(blocks, warps, programs, turns).seconds * MACHINE.clock


def run(blocks: Sequence[list[Record]], warps: int, programs: int = 1, turns: int = 1) -> Outcome:
    """Simulate programs whose warps go through all blocks ``turns`` times."""
    steps = tuple(BlockStep(b, 0, t) for t in range(turns) for b in range(len(blocks)))
    launch = Launch(blocks, [(0, [steps] * warps)] * programs, programs_each=1)
    return simulate(launch, H100, MACHINE)


@needs_compiler
def test_stall_counts_and_units() -> None:
    """A lone warp waits as it is told; four warps of a scheduler share its unit."""
    chain = block(*[instruction("LOP3.LUT", stall=4)] * 100)
    assert cycles([chain], 1) == pytest.approx(400, abs=8)
    dense = block(*[instruction("LOP3.LUT")] * 100)
    assert cycles([dense], 1) == pytest.approx(200, abs=8)  # half a warp a cycle
    assert cycles([dense], 4) == pytest.approx(200, abs=8)  # one warp on each of four schedulers
    assert cycles([dense], 16) == pytest.approx(800, abs=8)


@needs_compiler
def test_scoreboards_wait_for_memory() -> None:
    """A load is waited for where its scoreboard is, and not before."""
    load = instruction("LDG.E.128", write_barrier=2)
    use = instruction("LOP3.LUT", waits=1 << 2)
    request = Request(Source.HBM, 512)
    waiting = [block(load, request=request) + block(use)]
    free = [block(load, request=request) + block(instruction("LOP3.LUT", waits=1 << 3))]
    least = MACHINE.hbm_latency
    assert least < cycles(waiting, 1) < least + 40
    assert cycles(free, 1) < 40


@needs_compiler
def test_barriers_and_products() -> None:
    """Warps meet; tensor cores reach their peak with wgmma, and half of it with mma.sync."""
    late = [block(*[instruction("LOP3.LUT", stall=10)] * 10)]
    meeting = [*late, block(instruction("BAR.SYNC.DEFER_BLOCKING"))]
    assert cycles(meeting, 8) >= cycles(late, 8) + MACHINE.barrier_latency - 10
    product = "HGMMA.64x128x16.F32.BF16"
    ends_group = instruction(product, "R24, gdesc[UR4], R24, gsb0")
    complete = (ends_group, instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0"), instruction("NOP"))
    wgmma = [block(*[instruction(product)] * 49, *complete)]
    assert cycles(wgmma, 4) == pytest.approx(50 * 64, rel=0.05)
    mma = [block(*[instruction("HMMA.16816.F32.BF16")] * 50)]
    assert cycles(mma, 4) == pytest.approx(50 * 8, rel=0.05)


@needs_compiler
def test_copies_reach_the_bandwidth_of_hbm() -> None:
    """Enough loads in flight on all multiprocessors take their bytes at the assumed speed."""
    load = instruction("LDG.E.128", write_barrier=0)
    loads = block(*[load] * 8, request=Request(Source.HBM, 512))
    found = run([loads, block(instruction("NOP", waits=1))], 16, ALL, turns=8)
    ideal = ALL * 16 * 8 * 8 * 512 / H100.copy
    assert found.hbm_bytes == ALL * 16 * 8 * 8 * 512
    assert ideal < found.seconds < 1.25 * ideal
    assert bf16_seconds(4096, 4096, 1, H200) < bf16_seconds(4096, 4096, 1, H100)


def test_paths_go_round_loops() -> None:
    """Nested loops, with trips that depend on the turn of the outer one; none is left out."""
    outer, inner = Loop(1, 5), Loop(2, 3)
    listing = Listing((instruction("NOP"),) * 8, (outer, inner))

    def trips(loop: Loop, turns: tuple[tuple[Loop, int], ...]) -> int:
        return 2 if loop == outer else turns[0][1]

    spans = [(s.first, s.last) for s in walk(listing, trips)]
    assert spans == [(0, 0), (1, 1), (4, 5), (1, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.slow
@pytest.mark.skipif(not table.HAS_GATHER, reason="this Triton has no shared-memory gather")
@pytest.mark.parametrize(
    "num_tokens, groups, row_blocks, code",
    [(20, 1, 3, PLAIN), (100, 1, 2, PLAIN), (260, 2, 3, PLAIN), (20, 1, 3, TRELLIS)],
)
def test_every_tile_of_a_weight_is_multiplied_once(
    num_tokens: int, groups: int, row_blocks: int, code: str
) -> None:
    """By one program of every group of tokens: row blocks of 128 or 256 rows, 4 tiles long.

    A turn is a tile of each warp.
    """
    launch = wide_launch(300, 1600, num_tokens, Rate(11, code), TYPICAL)
    turns = [1 + max(step.turn for step in warps[0]) for _, warps in launch.programs]
    assert sum(turns) == groups * row_blocks * 4
    assert len({first for first, _ in launch.programs}) == groups
    bulk = [x for b in launch.blocks for x in b if x.unit == Unit.BULK_COPY]
    assert bulk and all(x.bytes > 0 for x in bulk)


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 128])
@pytest.mark.parametrize("name", ["w13", "w2"])
def test_programs_share_the_blocks_of_experts(num_tokens: int, name: str) -> None:
    """All turns are there once; no program has more than one above its share, or spare blocks."""
    shape, slots = MIXTURE.shapes[name], slots_of_experts(MIXTURE, num_tokens)
    assert sum(slots) == 8 * num_tokens and max(slots) <= num_tokens
    programs = turns_of_programs(shape, slots, ALL)
    of_block = -(-shape[0] // 16 // (2 if name == "w13" else 5))  # row tiles at once
    turns = sum(-(-count // 8) for count in slots) * of_block
    assert sum(map(sum, programs)) == turns and len(programs) <= ALL
    assert max(map(sum, programs)) <= -(-turns // ALL) + 1
    assert all(0 < own <= of_block for program in programs for own in program)


def test_a_grouped_product_reads_the_experts_that_are_hit() -> None:
    """Twice the experts, twice the bytes; the fixed time stays."""
    one, two = (bf16_grouped_seconds((1536, 2048), [1] * hit, 1, H100) - 2e-6 for hit in (1, 2))
    assert 1.9 < two / one < 2.0
    assert one == pytest.approx(2 * (1536 * 2048 + 2048 + 1536) / H100.copy)
