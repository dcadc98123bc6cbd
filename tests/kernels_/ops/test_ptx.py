"""The machine that executes PTX in the tests of the kernels."""

import numpy as np
import pytest

from tests.helpers.ptx.machine import Machine, TensorMap
from tests.helpers.ptx.registers import Array

HEAD = """
.visible .entry k(
    .param .u64 k_param_0,
    .param .align 64 .b8 k_param_1[128]
)
.reqntid 64
{
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mov.b32 %r2, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
"""
# Every thread stores its number, and loads that of the thread of the other warp.
EXCHANGE = """
    st.shared.b32 [%r4], %r1;
    {barrier}
    xor.b32 %r5, %r3, 128;
    add.s32 %r6, %r2, %r5;
    ld.shared.b32 %r7, [%r6];
    cvt.u64.u32 %rd2, %r3;
    add.s64 %rd3, %rd1, %rd2;
    st.global.b32 [%rd3], %r7;
    ret;
}}
"""
# A row of 64 numbers is copied to shared memory, and every thread loads one.
COPY = """
    setp.eq.b32 %p1, %r1, 0;
    add.s32 %r5, %r2, 1024;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
    bar.sync 0;
    mov.b32 %r6, k_param_1;
    cvt.u64.u32 %rd4, %r6;
    mov.b32 %r7, 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 1024;
    @%p1 {copy} [%r2], [%rd4, {{%r7, %r7}}], [%r5];
    {wait}
    shl.b32 %r8, %r1, 1;
    add.s32 %r9, %r2, %r8;
    ld.shared.b16 %rs1, [%r9];
    cvt.u32.u16 %r10, %rs1;
    cvt.u64.u32 %rd2, %r3;
    add.s64 %rd3, %rd1, %rd2;
    st.global.b32 [%rd3], %r10;
    ret;
}}
"""
COPY_OPCODE = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
WAIT = """
{
    .reg .pred complete;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r5], 0;
    @!complete bra.uni again;
}
"""
# Every thread stores what the lane before it has, within segments of four lanes, or -1.
SHUFFLE = """
    { .reg .pred inside;
    shfl.sync.up.b32 %r5|inside, %r1, 1, 0x1c00, 0xffffffff;
    selp.b32 %r6, %r5, -1, inside; }
    cvt.u64.u32 %rd2, %r3;
    add.s64 %rd3, %rd1, %rd2;
    st.global.b32 [%rd3], %r6;
    ret;
}
"""


def run(code: str, seed: int | None) -> Array:
    """What the 64 threads have stored, int32."""
    out, matrix = np.zeros(256, np.uint8), np.arange(64, dtype=np.uint16).view(np.uint8)
    tensor_map = TensorMap(2 << 32, (1, 64), (8, 64))
    memory = [(1 << 32, out), (2 << 32, matrix)]
    Machine(HEAD + code).run(memory, [1 << 32, tensor_map], (1, 1), 2048, seed=seed)
    return out.view(np.int32)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_missing_barrier_is_seen(seed: int | None) -> None:
    """In whatever order warps run."""
    exchanged = run(EXCHANGE.format(barrier="bar.sync 0;"), seed)
    assert exchanged.tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(AssertionError, match="race"):
        run(EXCHANGE.format(barrier=""), seed)


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_copy_that_nobody_waits_for_is_seen(seed: int | None) -> None:
    assert run(COPY.format(copy=COPY_OPCODE, wait=WAIT), seed).tolist() == list(range(64))
    with pytest.raises(AssertionError, match=r"race|waited for"):
        run(COPY.format(copy=COPY_OPCODE, wait=""), seed)


def test_a_lane_gets_the_value_of_the_one_before() -> None:
    expected = [thread - 1 if thread % 4 else -1 for thread in range(64)]
    assert run(SHUFFLE, None).tolist() == expected
