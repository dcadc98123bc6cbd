"""The Gluon kernel without a GPU: compiled ahead of time, its PTX executed on the CPU, its machine code counted."""

import re

import numpy as np
import pytest
import torch

from tests.helpers.ptx import Machine
from qamw_kernels.ops.gluon import launch as gluon_launch
from qamw_kernels.format.codebook import INDEX_BITS, load_codebook
from qamw_kernels.ops.gluon.launch import PARTS, WARPS, constants, log_row_tiles, parts_of, programs_per_processor, shared_bytes
from qamw_kernels.ops.linear import INTERPRETED, quadrant_words
from qamw_kernels.format.packing import pack_planes
from qamw_kernels.ops.tiling import tile_planes, untile
from benchmarks.kernels.sass import SHARED_BYTES, compile_for, disassemble, loops

needs_gluon = pytest.mark.skipif(INTERPRETED or gluon_launch.kernels is None, reason="this Triton has no shared-memory gather")
PAIRS_PER_THREAD = 128  # of a tile


@pytest.mark.parametrize("num_rows, num_inputs", [(70, 4608), (1, 64), (1100, 576)])
@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_tiles_hold_the_indices(index_bits: int, num_rows: int, num_inputs: int) -> None:
    indices = torch.randint(0, 2**index_bits, (num_rows, num_inputs // 2)).short()
    assert torch.equal(untile(tile_planes(pack_planes(indices, index_bits)), num_rows, num_inputs), indices)


def compile_gemm(target: int, index_bits: int, dtype: torch.dtype, parts: int):
    return compile_for(target, gluon_launch.kernels.decode_gemm_kernel, constants(index_bits, dtype, parts, SHARED_BYTES[target]))


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).copy()


def run_on_cpu(compiled, x, indices, row_norms, bias, parts: int, log: int, programs: int = 3) -> tuple[torch.Tensor, Machine]:
    """y [M, N], and the machine it was computed on."""
    index_bits = int(np.log2(len(indices.unique()) - 1)) + 1
    tiles = tile_planes(pack_planes(indices, index_bits))
    y = torch.full((len(x), len(row_norms)), torch.nan, dtype=x.dtype)
    buffers = [as_bytes(t) for t in (x, tiles, row_norms, quadrant_words(index_bits), y if bias is None else bias, y)]
    machine = Machine(compiled.asm["ptx"])
    addresses = [(i + 1) << 32 for i in range(len(buffers))]
    sizes = [len(x), len(row_norms), x.shape[1], int(bias is not None), log]
    machine.run(list(zip(addresses, buffers, strict=True)), [*addresses, *sizes, 0, 0],
                (programs, -(-len(x) // (8 * parts))), compiled.metadata.shared, 128 << (index_bits - 2))
    return torch.from_numpy(buffers[-1]).view(x.dtype).view(y.shape), machine


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("num_tokens, num_rows, num_inputs, log", [
    (1, 70, 4608, 0), (8, 16, 576, 3), (13, 33, 4096, 1), (70, 100, 8704, 2)])
@pytest.mark.parametrize("index_bits, dtype", [*((b, torch.bfloat16) for b in INDEX_BITS), (11, torch.float16)], ids=str)
def test_ptx_is_right(index_bits: int, dtype: torch.dtype, num_tokens: int, num_rows: int, num_inputs: int, log: int) -> None:
    """Whole tiles, tiles that some warps lack, tiles cut off; several programs, row tiles at once or one by one, and parts."""
    generator = torch.Generator().manual_seed(0)
    indices = (torch.randperm(num_rows * num_inputs // 2, generator=generator) % 2**index_bits).view(num_rows, -1)
    x = torch.randn(num_tokens, num_inputs, generator=generator).to(dtype)
    row_norms = torch.rand(num_rows, generator=generator) + 0.5
    bias = torch.randn(num_rows, generator=generator).to(dtype) if num_tokens > 1 else None
    parts = parts_of(num_tokens)
    y, machine = run_on_cpu(compile_gemm(90, index_bits, dtype, parts), x, indices, row_norms, bias, parts, log)
    truth = x.double() @ load_codebook(index_bits)[indices].flatten(1).double().T * row_norms.double()
    truth = truth if bias is None else truth + bias.double()
    torch.testing.assert_close(y.double(), truth, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11, atol=1e-3)
    # One wrong weight spoils a row, which is one in a hundred at least.
    assert (y == truth.to(dtype)).double().mean() > 0.99
    assert machine.look_ups % PAIRS_PER_THREAD == 0 < machine.look_ups and machine.look_up_conflicts == 1, "lanes of one bank"


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("index_bits", INDEX_BITS)
@pytest.mark.parametrize("target", [80, 89, 90, 100])
def test_main_loop(target: int, index_bits: int) -> None:
    """An H200 has time for 9.5 instructions per pair at its memory's speed; the decode kernel is held to 6.5 everywhere."""
    if shared_bytes(index_bits) > SHARED_BYTES[target]:
        pytest.skip("the table does not fit: the plain kernel runs")
    compiled = compile_gemm(target, index_bits, torch.bfloat16, 1)
    instructions = disassemble(compiled)
    assert not [opcode for opcode, _ in instructions if re.match("LDL|STL", opcode)], "spills"
    assert compiled.metadata.shared <= shared_bytes(index_bits)
    main = min((body for body in loops(instructions) if body["LDS"] == PAIRS_PER_THREAD), key=lambda body: body.total())
    assert main.total() <= 6.5 * PAIRS_PER_THREAD, main
    assert sum(n for opcode, n in main.items() if opcode.startswith("LDG")) == main["LDG.E.128"] == index_bits + 16, main
    assert sum(n for opcode, n in main.items() if opcode.startswith("HMMA")) == 32, main
    assert not [opcode for opcode in main if re.match("LDL|STL|SHFL|BAR|STS", opcode)], main


def test_programs_fit_the_processor() -> None:
    """Two programs share a multiprocessor where their tables fit: 11 bits not on sm_89, 12 bits nowhere; nor do 64 tokens' sums."""
    two = {target: [bits for bits in INDEX_BITS if programs_per_processor(bits, 1, size) == 2] for target, size in SHARED_BYTES.items()}
    assert two == {80: [6, 7, 8, 9, 10, 11], 89: [6, 7, 8, 9, 10], 90: [6, 7, 8, 9, 10, 11], 100: [6, 7, 8, 9, 10, 11]}
    assert [programs_per_processor(8, parts, SHARED_BYTES[90]) for parts in PARTS] == [2, 2, 2, 1]


def test_warps_are_shared_out() -> None:
    """Llama-3-8B's and Llama-2-13B's layers on 264 programs: more row tiles at once where the inputs are no multiple of 4096."""
    def busy(num_rows: int, num_inputs: int) -> tuple[int, float]:
        """Row tiles at once, and the share of the busiest program's rounds that it would have if all were equally busy."""
        rows, inputs = num_rows // 16, num_inputs // 512
        log = log_row_tiles(rows, inputs, 264)
        rounds = -(-rows // (264 << log)) * -(-(inputs << log) // WARPS)
        return 1 << log, rows * inputs / (WARPS * 264 * rounds)

    assert busy(28672, 4096) == (1, pytest.approx(0.97, abs=0.01))
    assert busy(27648, 5120) == (4, pytest.approx(0.82, abs=0.01))  # one at a time: 0.58
    assert busy(15360, 5120) == (4, pytest.approx(0.91, abs=0.01))  # 0.57
