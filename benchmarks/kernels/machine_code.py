"""``make kernels-report``: what the compiler makes of the kernels, for every Triton that vLLM pins. Needs no GPU.

Writes kernels/benchmarks/results/machine_code.json and .md. Other Tritons are installed into a directory that is thrown away.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "kernels" / "benchmarks" / "results"
TRITONS = {"3.6.0": "vLLM 0.20 to 0.26", "3.7.1": "vLLM 0.27 to 0.32", "3.8.0": "vLLM 0.33"}
TARGETS = (80, 89, 90, 100)


def row(name: str, target: int, kernel: Any, constants: dict[str, Any], pairs: int = 0, loop_of: Any = None) -> dict[str, Any]:
    """Figures of one compiled kernel; ``pairs`` that a thread decodes in one turn of the loop that ``loop_of`` picks."""
    import triton

    from benchmarks.kernels.sass import compile_for, disassemble, loops, registers

    compiled = compile_for(target, kernel, constants)
    instructions = disassemble(compiled)
    everything = collections.Counter(opcode.split(".")[0] for opcode, _ in instructions)
    found = {"triton": triton.__version__, "sm": target, "kernel": name, "registers": registers(compiled),
             "spills": everything["LDL"] + everything["STL"], "shared_bytes": compiled.metadata.shared}
    if pairs:
        loop = loop_of(loops(instructions))
        total = collections.Counter()
        for opcode, count in loop.items():
            total[opcode.split(".")[0]] += count
        found |= {"instructions_per_pair": round(loop.total() / pairs, 2), "loop": loop.total(), "matrix": total["HMMA"] + total["HGMMA"],
                  "look_ups": total["LDS"], "wide_loads": sum(n for op, n in loop.items() if re.match(r"LDG\.E.*128", op)),
                  "other_loads": sum(n for op, n in loop.items() if op.startswith("LDG") and "128" not in op)}
    return found


def rows() -> list[dict[str, Any]]:
    """All figures of the Triton that is imported."""
    import torch

    from qamw_kernels.ops.gluon import launch as gluon_launch
    from qamw_kernels.ops.triton import kernels as triton_kernels
    from qamw_kernels.ops.triton import launch as triton_launch
    from benchmarks.kernels.sass import SHARED_BYTES

    found = []
    for target in TARGETS:
        if gluon_launch.kernels is not None:
            for bits, parts in [*((bits, 1) for bits in range(6, 13)), (11, 2), (11, 4), (11, 8)]:
                if gluon_launch.shared_bytes(bits) > SHARED_BYTES[target]:
                    continue
                found.append(row(f"decode_gemm (Gluon), b = {bits}, {8 * parts} tokens", target, gluon_launch.kernels.decode_gemm_kernel,
                                 gluon_launch.constants(bits, torch.bfloat16, parts, SHARED_BYTES[target]), 128,
                                 lambda bodies: min((b for b in bodies if b["LDS"] == 128), key=collections.Counter.total)))
        for kind in ("skinny", "wide"):
            constants = triton_launch.gemm_constants(11, torch.bfloat16, kind)
            pairs = constants["ROW_TILES"] * 256 // (32 * constants["num_warps"])
            for name, kernel in (("gemm", triton_kernels.gemm_kernel), ("routed gemm", triton_kernels.routed_gemm_kernel)):
                found.append(row(f"{name}, b = 11, {kind}", target, kernel, constants, pairs,
                                 lambda bodies: max(bodies, key=collections.Counter.total)))
        constants = triton_launch.dequantize_constants(11, 128, torch.bfloat16)
        found.append(row("dequantize, b = 11, B = 128", target, triton_kernels.dequantize_kernel, constants))
        constants = triton_launch.rotate_constants(128, torch.bfloat16)
        found.append(row("rotate, B = 128", target, triton_kernels.rotate_kernel, constants))
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    lines = [
        "# Machine code of the kernels", "",
        "Written by `make kernels-report`, without a GPU: compiled ahead of time, disassembled, counted. bfloat16. The loop is the",
        "innermost one that decodes; its instructions include loads, matrix instructions and its own control. An H200 at its memory's",
        "speed has time for 9.5 instructions per pair at b = 11. That look-ups in shared memory have no bank conflicts is shown by",
        "`tests/test_gluon.py`, which executes the PTX. Matrix instructions counted are HMMA and HGMMA.", "",
    ]
    for version in dict.fromkeys(r["triton"] for r in found):
        lines += [f"## Triton {version}" + (f" ({TRITONS[version]})" if version in TRITONS else ""), "",
                  "| kernel | sm | instructions per pair | in the loop: all | matrix | shared loads | 16-byte loads | other loads "
                  "| registers | spills | shared KiB |", "|" + "---|" * 11]
        for r in (r for r in found if r["triton"] == version):
            loop = [str(r.get(k, "")) for k in ("instructions_per_pair", "loop", "matrix", "look_ups", "wide_loads", "other_loads")]
            lines.append(f"| {' | '.join([r['kernel'], str(r['sm']), *loop, str(r['registers']), str(r['spills'])])} "
                         f"| {r['shared_bytes'] / 1024:.1f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for version in (*TRITONS, None):
            environment, path = dict(os.environ), Path(directory) / str(version)
            if version:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", path]
                subprocess.run([*pip, f"triton=={version}"], check=True)
                environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
            done = subprocess.run([sys.executable, __file__, "--rows"], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found += json.loads(done.stdout.splitlines()[-1])
            print(f"Triton {found[-1]['triton']}: {len(found)} rows", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "machine_code.json").write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    (RESULTS / "machine_code.md").write_text(markdown(found))


if __name__ == "__main__":
    print(json.dumps(rows())) if sys.argv[1:] == ["--rows"] else main()
