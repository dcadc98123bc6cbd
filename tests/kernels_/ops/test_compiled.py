"""Every kernel compiles ahead of time for sm_80, sm_89 and sm_90: tensor cores and no spills.

Needs no GPU.
"""

import collections
from typing import Any

import pytest
import torch

from benchmarks.kernels.sass import compile_for, disassemble
from qamw_kernels.format.codebook import INDEX_BITS, TRELLIS
from qamw_kernels.format.config import ROTATION_BLOCK_SIZES
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.triton.kernels import (
    dequantize_kernel,
    gemm_kernel,
    routed_gemm_kernel,
)
from qamw_kernels.ops.triton.launch import dequantize_constants, gemm_constants
from qamw_kernels.ops.triton.rotate_kernels import rotate_kernel
from qamw_kernels.ops.triton.rotate_launch import rotate_constants
from qamw_kernels.ops.weight import Rate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreted(), reason="the interpreter replaces the compiler"),
]

TARGETS = {80: "HMMA", 89: "HMMA", 90: "HGMMA"}  # -> matrix instruction of a GEMM
SHARED_MEMORY = 99 * 1024  # bytes per program on sm_89, the smallest of the three
NARROW = (torch.bfloat16, torch.float16)


def opcodes_of(target: int, kernel: Any, constants: dict[str, Any]) -> collections.Counter[str]:
    """Opcode -> count."""
    compiled = compile_for(target, kernel, constants)
    opcodes = collections.Counter(opcode.split(".")[0] for opcode, _ in disassemble(compiled))
    stores, loads = opcodes["STL"], opcodes["LDL"]
    assert opcodes["STG"], "nothing is written"
    assert not loads and not stores, f"{stores} spill stores, {loads} loads"
    assert compiled.metadata.shared <= SHARED_MEMORY
    return opcodes


@pytest.mark.parametrize("kind", ["skinny", "wide"])
@pytest.mark.parametrize("index_bits", [8, 11])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_gemm(target: int, dtype: torch.dtype, index_bits: int, kind: str) -> None:
    opcodes = opcodes_of(target, gemm_kernel, gemm_constants(Rate(index_bits), dtype, kind))
    assert opcodes[TARGETS[target]]


@pytest.mark.parametrize("kind", ["skinny", "wide"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_routed_gemm(target: int, dtype: torch.dtype, kind: str) -> None:
    opcodes = opcodes_of(target, routed_gemm_kernel, gemm_constants(Rate(11), dtype, kind))
    assert opcodes[TARGETS[target]]


@pytest.mark.parametrize("kind", ["skinny", "wide"])
@pytest.mark.parametrize("target", TARGETS)
def test_gemm_of_the_trellis(target: int, kind: str) -> None:
    rate = Rate(11, TRELLIS)
    opcodes = opcodes_of(target, gemm_kernel, gemm_constants(rate, torch.bfloat16, kind))
    assert opcodes[TARGETS[target]]


@pytest.mark.parametrize("index_bits", [b for b in INDEX_BITS if b not in (8, 11)])
def test_gemm_other_index_bits(index_bits: int) -> None:
    constants = gemm_constants(Rate(index_bits), torch.bfloat16, "skinny")
    assert opcodes_of(90, gemm_kernel, constants)["HGMMA"]


@pytest.mark.parametrize("kind", ["skinny", "wide"])
@pytest.mark.parametrize("target", TARGETS)
def test_gemm_float32_uses_no_tf32(target: int, kind: str) -> None:
    opcodes = opcodes_of(target, gemm_kernel, gemm_constants(Rate(11), torch.float32, kind))
    assert opcodes["FFMA"] and not opcodes["HMMA"] and not opcodes["HGMMA"]


@pytest.mark.parametrize(
    "dtype, rotation_block_size",
    [
        *((torch.bfloat16, size) for size in ROTATION_BLOCK_SIZES),
        (torch.float16, 128),
        (torch.float32, 128),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_rotate(target: int, dtype: torch.dtype, rotation_block_size: int) -> None:
    opcodes = opcodes_of(target, rotate_kernel, rotate_constants(rotation_block_size, dtype))
    if dtype in NARROW:
        assert opcodes["HMMA"] + opcodes["HGMMA"]
    else:
        assert opcodes["FFMA"] + opcodes["FADD"]


@pytest.mark.parametrize(
    "dtype, index_bits, rotation_block_size",
    [
        (torch.bfloat16, 8, 128),
        (torch.bfloat16, 11, 16),
        (torch.bfloat16, 11, 64),
        (torch.bfloat16, 11, 512),
        (torch.float16, 11, 64),
        (torch.float32, 11, 64),
        (torch.float32, 11, 512),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_dequantize(
    target: int, dtype: torch.dtype, index_bits: int, rotation_block_size: int
) -> None:
    constants = dequantize_constants(Rate(index_bits), rotation_block_size, dtype)
    assert opcodes_of(target, dequantize_kernel, constants)[TARGETS[target]]


def test_a_spill_would_be_seen() -> None:
    """The checks read the disassembly: a tile far too large for the registers must fail them."""
    constants = gemm_constants(Rate(8), torch.bfloat16, "wide")
    larger = {name: constants[name] * factor for name, factor in (("BLOCK_M", 4), ("ROW_TILES", 2))}
    with pytest.raises(AssertionError, match="spill"):
        opcodes_of(80, gemm_kernel, constants | larger)
