"""Every kernel compiles ahead of time for sm_80, sm_89 and sm_90, to tensor-core code without spills. Needs no GPU."""

import collections

import pytest
import torch
from triton.compiler import ASTSource

from qamw_kernels.codebook import INDEX_BITS
from qamw_kernels.rotation import ROTATION_BLOCK_SIZES
from qamw_kernels.triton_kernels import INTERPRETED, dequantize_kernel, gemm_kernel, rotate_kernel
from qamw_kernels.triton_launch import (
    DEQUANTIZE_TILE,
    DEQUANTIZE_WIDTH,
    GEMM_TILES,
    ROTATE_TILES,
    ROTATE_WIDTH,
    TL_DTYPES,
    Tile,
)
from sass import compile_for, disassemble

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED.value, reason="the interpreter replaces the compiler")]

TARGETS = {80: "HMMA", 89: "HMMA", 90: "HGMMA"}  # -> matrix instruction of a GEMM
SHARED_MEMORY = 99 * 1024  # bytes per program on sm_89, the smallest of the three
NARROW = (torch.bfloat16, torch.float16)


def compile_to_sass(kernel, target: int, dtype: torch.dtype, tile: Tile, constexprs: dict):
    """Opcode -> count. Arguments are typed by name; pointers and K are multiples of 16, the other sizes are anything."""
    activation = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = {"p_tiles": "*i32", "p_quadrant": "*i32", "p_row_norms": "*fp32", "p_input_scales": "*fp16", "scale": "fp32"}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        default = activation if name.startswith("p_") else "i32"
        signature[name] = "constexpr" if name in constexprs else types.get(name, default)
        if name.startswith("p_") or name == "K":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = compile_for(source, target, num_warps=tile.num_warps, num_stages=tile.num_stages)
    opcodes = collections.Counter(opcode.split(".")[0] for opcode, _ in disassemble(compiled))
    assert opcodes["STG"], "nothing is written"
    assert not opcodes["LDL"] and not opcodes["STL"], f"{opcodes['STL']} spill stores, {opcodes['LDL']} loads"
    assert compiled.metadata.shared <= SHARED_MEMORY
    return opcodes


def gemm_opcodes(target: int, dtype: torch.dtype, index_bits: int, kind: str, **constexprs: int):
    tile = GEMM_TILES[kind, dtype.itemsize]
    constexprs = {"INDEX_BITS": index_bits, "DTYPE": TL_DTYPES[dtype], "BLOCK_M": tile.BLOCK_M,
                  "ROW_TILES": tile.ROW_TILES, **constexprs}
    return compile_to_sass(gemm_kernel, target, dtype, tile, constexprs)


@pytest.mark.parametrize("kind", ["skinny", "wide"])
@pytest.mark.parametrize("index_bits", [8, 11])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_gemm(target, dtype, index_bits, kind):
    assert gemm_opcodes(target, dtype, index_bits, kind)[TARGETS[target]]


@pytest.mark.parametrize("index_bits", [b for b in INDEX_BITS if b not in (8, 11)])
def test_gemm_other_index_bits(index_bits):
    assert gemm_opcodes(90, torch.bfloat16, index_bits, "skinny")["HGMMA"]


@pytest.mark.parametrize("kind", ["skinny", "wide"])
@pytest.mark.parametrize("target", TARGETS)
def test_gemm_float32_uses_no_tf32(target, kind):
    opcodes = gemm_opcodes(target, torch.float32, 11, kind)
    assert opcodes["FFMA"] and not opcodes["HMMA"] and not opcodes["HGMMA"]


@pytest.mark.parametrize(
    "dtype, rotation_block_size",
    [*((torch.bfloat16, size) for size in ROTATION_BLOCK_SIZES), (torch.float16, 128), (torch.float32, 128)],
)
@pytest.mark.parametrize("target", TARGETS)
def test_rotate(target, dtype, rotation_block_size):
    tile = ROTATE_TILES[dtype.itemsize]
    constexprs = {"B": rotation_block_size, "WIDTH": min(rotation_block_size, ROTATE_WIDTH), "BLOCK_R": tile.BLOCK_M,
                  "DTYPE": TL_DTYPES[dtype]}
    opcodes = compile_to_sass(rotate_kernel, target, dtype, tile, constexprs)
    assert opcodes["HMMA"] + opcodes["HGMMA"] if dtype in NARROW else opcodes["FFMA"] + opcodes["FADD"]


@pytest.mark.parametrize(
    "dtype, index_bits, rotation_block_size",
    [(torch.bfloat16, 8, 128), (torch.bfloat16, 11, 16), (torch.bfloat16, 11, 64), (torch.bfloat16, 11, 512),
     (torch.float16, 11, 64), (torch.float32, 11, 64), (torch.float32, 11, 512)],
)
@pytest.mark.parametrize("target", TARGETS)
def test_dequantize(target, dtype, index_bits, rotation_block_size):
    tile = DEQUANTIZE_TILE
    constexprs = {"INDEX_BITS": index_bits, "B": rotation_block_size, "WIDTH": min(max(rotation_block_size, 32), DEQUANTIZE_WIDTH),
                  "DTYPE": TL_DTYPES[dtype], "ROW_TILES": tile.ROW_TILES}
    opcodes = compile_to_sass(dequantize_kernel, target, dtype, tile, constexprs)
    assert opcodes[TARGETS[target]]


def test_a_spill_would_be_seen():
    """The checks above read the disassembly: a tile far too large for the registers must fail them."""
    tile = GEMM_TILES["wide", 2]
    with pytest.raises(AssertionError, match="spill"):
        gemm_opcodes(80, torch.bfloat16, 8, "wide", BLOCK_M=4 * tile.BLOCK_M, ROW_TILES=2 * tile.ROW_TILES)
