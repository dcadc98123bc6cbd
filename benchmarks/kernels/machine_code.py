"""What the compiler makes of the kernels, for every Triton that vLLM pins. Needs no GPU.

``make kernels-report`` runs it. Writes benchmarks/kernels/results/machine_code.json and .md. Other
versions of Triton are installed into a directory that is thrown away.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qamw_kernels.format.codebook import CODES, INDEX_BITS, TRELLIS

if TYPE_CHECKING:
    from qamw_kernels.ops.weight import Rate

RESULTS = Path(__file__).with_name("results")
ROOT = Path(__file__).resolve().parents[2]
TRITONS = {
    "3.6.0": "vLLM 0.20 to 0.26",
    "3.7.1": "vLLM 0.27 to 0.32",
    "3.8.0": "vLLM 0.33",
}
TARGETS = (80, 89, 90, 100)
FEW_SPILLS = 4
"""Spills in the loop over tiles that are accepted: for values that are read once per tile."""

Loop = collections.Counter[str]
INTRODUCTION = """\
# Machine code of the kernels

Written by `make kernels-report`, without a GPU: the kernels, for bfloat16, are compiled ahead of
time and disassembled, and their instructions are counted. "The loop" is the innermost loop that
decodes; its instructions include loads, matrix instructions and its own control. If an H200 reads
weights at the full speed of its memory, it has time for 9.5 instructions per pair at b = 11. How
many lanes of a look-up wait for each other is checked by `tests/kernels_/ops/test_decode.py` and
`test_wide.py`, which execute the PTX. The matrix instructions that are counted are HMMA and HGMMA.
"""
COLUMNS = (
    "kernel",
    "sm",
    "instructions per pair",
    "in the loop: all",
    "matrix",
    "shared loads",
    "16-byte loads",
    "other loads",
    "registers",
    "spills",
    "shared KiB",
)
OF_THE_LOOP = (
    "instructions_per_pair",
    "loop",
    "matrix",
    "look_ups",
    "wide_loads",
    "other_loads",
)


def figures_of_loop(loop: Loop, pairs: int) -> dict[str, Any]:
    """Figures of a loop in which a thread decodes ``pairs`` in one turn."""
    total: Loop = collections.Counter()
    for opcode, count in loop.items():
        total[opcode.split(".")[0]] += count
    loads = {opcode: n for opcode, n in loop.items() if opcode.startswith("LDG")}
    return {
        "instructions_per_pair": round(loop.total() / pairs, 2),
        "loop": loop.total(),
        "matrix": total["HMMA"] + total["HGMMA"],
        "look_ups": total["LDS"],
        "wide_loads": sum(n for op, n in loads.items() if re.match(r"LDG\.E.*128", op)),
        "other_loads": sum(n for op, n in loads.items() if "128" not in op),
        "spills_in_loop": total["LDL"] + total["STL"],
    }


def row(
    name: str,
    target: int,
    kernel: Any,
    constants: dict[str, Any],
    pairs: int = 0,
    loop_of: Callable[[list[Loop]], Loop] | None = None,
) -> dict[str, Any]:
    """Figures of one compiled kernel.

    Args:
        pairs: pairs that a thread decodes in one turn of the loop that ``loop_of`` picks; 0 for a
            kernel whose loop is not analyzed.
    """
    import triton

    from benchmarks.kernels.sass import compile_for, disassemble, loops, registers

    compiled = compile_for(target, kernel, constants)
    instructions = disassemble(compiled)
    everything = collections.Counter(opcode.split(".")[0] for opcode, _ in instructions)
    found = {
        "triton": triton.__version__,
        "sm": target,
        "kernel": name,
        "registers": registers(compiled),
        "spills": everything["LDL"] + everything["STL"],
        "shared_bytes": compiled.metadata.shared,
    }
    if loop_of is not None:
        found |= figures_of_loop(loop_of(loops(instructions)), pairs)
    return found


def label(rate: "Rate") -> str:
    """A rate, as tables have it."""
    return f"b = {rate.index_bits}{', trellis' * (rate.code == TRELLIS)}"


def gluon_rows(target: int) -> Iterator[dict[str, Any]]:
    """Figures of the Gluon kernel, where the Triton that is imported can compile it."""
    import torch

    from benchmarks.kernels.sass import SHARED_BYTES
    from qamw_kernels.ops.gluon import decode_launch, narrow_launch, routed_launch, table
    from qamw_kernels.ops.launcher import Processor
    from qamw_kernels.ops.weight import Rate

    if not table.HAS_GATHER:
        return
    pairs, shared_memory = 128, SHARED_BYTES[target]
    processor = Processor(1, shared_memory, target)

    def decoding(bodies: list[Loop]) -> Loop:
        return min((b for b in bodies if b["LDS"] == pairs), key=collections.Counter.total)

    rates = [Rate(bits, code) for code in CODES for bits in INDEX_BITS]
    for rate in rates:
        name = f"narrow_gemm (Gluon), {label(rate)}, 8 tokens"
        constants = narrow_launch.constants(rate, torch.bfloat16, processor)
        # Its loop is not analyzed: the one that decodes contains another one, for the prefetch.
        yield row(name, target, narrow_launch.kernel, constants)
        if narrow_launch.begins_early(processor):
            name = f"routed_narrow_gemm (Gluon), {label(rate)}, blocks of 8 slots"
            yield row(name, target, routed_launch.narrow_kernel, constants)
    more = [(Rate(11), 4), (Rate(11), 8), (Rate(11, TRELLIS), 4), (Rate(11, TRELLIS), 8)]
    for rate, parts in [*((rate, 2) for rate in rates), *more]:
        if target != 90:
            name = f"decode_gemm (Gluon), {label(rate)}, {8 * parts} tokens"
            constants = decode_launch.constants(rate, torch.bfloat16, parts, shared_memory)
            yield row(name, target, decode_launch.kernel, constants, pairs, decoding)


def wide_rows(target: int) -> Iterator[dict[str, Any]]:
    """Figures of the Gluon kernels with warpgroup products, and of the kernel that adds up."""
    import torch

    from benchmarks.kernels.sass import SHARED_BYTES
    from qamw_kernels.ops.gluon import dequantize_launch, routed_launch, wide_launch
    from qamw_kernels.ops.weight import Rate

    if wide_launch.kernels is None or target != 90:
        return
    shared_memory = SHARED_BYTES[target]

    def decoding(bodies: list[Loop]) -> Loop:
        return max(bodies, key=lambda b: b["LDS"])

    rates = [Rate(bits, code) for code in CODES for bits in INDEX_BITS]
    more = [(Rate(11, code), t) for code in CODES for t in wide_launch.TILES if t > 16]
    for rate, tokens in [*((rate, 16) for rate in rates), *more]:
        constants = wide_launch.constants(rate, torch.bfloat16, tokens, shared_memory)
        kernel = wide_launch.kernels.wide_gemm_kernel
        name = f"wide_gemm (Gluon), {label(rate)}, {tokens} tokens"
        yield row(name, target, kernel, constants, 128, decoding)
    assert routed_launch.wide_kernels is not None
    blocks = [(Rate(11, code), s) for code in CODES for s in routed_launch.WIDE_SLOTS]
    for rate, slots in [*blocks, (Rate(12), 128)]:
        constants = wide_launch.constants(rate, torch.bfloat16, slots, shared_memory)
        kernel = routed_launch.wide_kernels.routed_wide_gemm_kernel
        name = f"routed_wide_gemm (Gluon), {label(rate)}, blocks of {slots} slots"
        yield row(name, target, kernel, constants, 128, decoding)
    constants = wide_launch.sum_constants(torch.bfloat16)
    assert wide_launch.sums_kernels is not None
    kernel = wide_launch.sums_kernels.add_sums_kernel
    yield row("add_sums (Gluon)", target, kernel, constants)
    assert dequantize_launch.kernels is not None
    for rate in rates:
        constants = dequantize_launch.constants(rate, 128, torch.bfloat16, shared_memory)
        kernel = dequantize_launch.kernels.dequantize_kernel
        name = f"dequantize (Gluon), {label(rate)}, B = 128"
        yield row(name, target, kernel, constants, 128, decoding)


def triton_rows(target: int) -> Iterator[dict[str, Any]]:
    """Figures of the Triton kernels."""
    import torch

    from qamw_kernels.ops.triton import kernels, launch, rotate_kernels, rotate_launch
    from qamw_kernels.ops.weight import Rate

    def largest(bodies: list[Loop]) -> Loop:
        return max(bodies, key=collections.Counter.total)

    gemms = {"gemm": kernels.gemm_kernel, "routed gemm": kernels.routed_gemm_kernel}
    for rate in (Rate(11, code) for code in CODES):
        for kind in ("skinny", "wide"):
            constants = launch.gemm_constants(rate, torch.bfloat16, kind)
            pairs = constants["ROW_TILES"] * 256 // (32 * constants["num_warps"])
            for name, kernel in gemms.items():
                title = f"{name}, {label(rate)}, {kind}"
                yield row(title, target, kernel, constants, pairs, largest)
        constants = launch.dequantize_constants(rate, 128, torch.bfloat16)
        title = f"dequantize, {label(rate)}, B = 128"
        yield row(title, target, kernels.dequantize_kernel, constants)
    constants = rotate_launch.rotate_constants(128, torch.bfloat16)
    yield row("rotate, B = 128", target, rotate_kernels.rotate_kernel, constants)
    for by_expert in (False, True):
        constants = rotate_launch.rotate_many_constants(128, torch.bfloat16, by_expert)
        name = f"rotate_many, B = 128{', by expert' * by_expert}"
        yield row(name, target, rotate_kernels.rotate_many_kernel, constants)


def rows() -> list[dict[str, Any]]:
    """All figures of the Triton that is imported."""
    return [
        found
        for target in TARGETS
        for make in (gluon_rows, wide_rows, triton_rows)
        for found in make(target)
    ]


def markdown(found: list[dict[str, Any]]) -> str:
    """One table per version of Triton."""
    lines = [INTRODUCTION]
    for version in dict.fromkeys(r["triton"] for r in found):
        used_by = f" ({TRITONS[version]})" if version in TRITONS else ""
        lines += [f"## Triton {version}{used_by}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        for r in (r for r in found if r["triton"] == version):
            loop = [str(r.get(key, "")) for key in OF_THE_LOOP]
            cells = [r["kernel"], str(r["sm"]), *loop, str(r["registers"]), str(r["spills"])]
            lines.append(f"| {' | '.join(cells)} | {r['shared_bytes'] / 1024:.1f} |")
        lines.append("")
    return "\n".join(lines)


def rows_of_version(version: str | None, directory: Path) -> list[dict[str, Any]]:
    """The figures of a version of Triton, installed below ``directory``; None: the one here."""
    paths = [os.environ.get("PYTHONPATH", "")]
    if version:
        target = str(directory / version)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
        subprocess.run([*pip, f"triton=={version}"], check=True)
        paths.insert(0, target)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.machine_code", "--rows"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        other = [None] if metadata.version("triton") not in TRITONS else []
        for version in (*TRITONS, *other):
            found += rows_of_version(version, Path(directory))
            print(f"Triton {found[-1]['triton']}: {len(found)} rows", flush=True)
    RESULTS.mkdir(exist_ok=True)
    text = "[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n"
    (RESULTS / "machine_code.json").write_text(text)
    (RESULTS / "machine_code.md").write_text(markdown(found))
    # An H100 took up to 1.5 times as long with a Triton that made small loads, and spilled.
    wide = [r for r in found if "wide" in r["kernel"] and "Gluon" in r["kernel"]]
    slow = [r for r in wide if r["other_loads"] or r["spills_in_loop"] > FEW_SPILLS]
    slow += [r for r in found if r["kernel"].startswith("dequantize (Gluon)") and r["spills"]]
    if slow:
        sys.exit(
            f"small loads, or spills in the loop: {[(r['triton'], r['kernel']) for r in slow]}"
        )


if __name__ == "__main__":
    print(json.dumps(rows())) if sys.argv[1:] == ["--rows"] else main()
