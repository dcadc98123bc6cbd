"""Every number of the model that is not in the machine code, with its source.

Two sources are cited often: [1] "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking", arXiv 2402.13499; [2] NVIDIA's H100 and H200 datasheets. "Assumed" marks what
no source was found for; `report.sensitivity` says how much depends on it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU with 132 multiprocessors of compute capability 9.0.

    Attributes:
        datasheet: bytes per second of HBM, as advertised [2].
        copy: bytes per second that a copy of large buffers reaches, reads and writes together.
    """

    name: str
    datasheet: float
    copy: float


H100 = Gpu("H100", datasheet=3.35e12, copy=3.0e12)
H200 = Gpu("H200", datasheet=4.8e12, copy=4.3e12)
GPUS = (H100, H200)

MULTIPROCESSORS = 132  # [2], of the SXM cards


@dataclass(frozen=True)
class Machine:
    """Rates and latencies, in cycles unless another unit is given.

    Attributes:
        clock: hertz; the boost clock under load of an SXM card.
        l2_bandwidth: bytes per second of all multiprocessors together [1].
        link: bytes per cycle from L2 into one multiprocessor [1].
        hbm_latency, l2_latency, l1_latency, shared_latency: until a lone load's data come [1].
        shuffle_latency: of a shuffle between lanes; assumed.
        barrier_latency: from the last warp's arrival until the others go on; assumed.
        read_latency: until a source register may be overwritten; assumed.
        alu, fma: a warp's instruction on 16 lanes of a scheduler's unit.
        hmma: an m16n8k16 product of one scheduler. Half of the tensor cores' peak: mma.sync
            reaches 62 % of it on Hopper [1]. Twice as long gives the same times at few tokens.
        wgmma_per_column: of m64nNk16 per column of N, on all four schedulers at once: the peak of
            989 TFLOP/s at 1.83 GHz [2], which wgmma reaches from N = 64 on, with the first operand
            in registers or in shared memory [1].
        wgmma_latency: beyond that; assumed.
        lsu_bytes: bytes per cycle between shared memory, or L1, and registers.
        queue: how far the load/store unit may be behind before schedulers stop feeding it; assumed.
        program_start: from a free place to a program's first instruction; assumed.
        launch_gap: seconds from the last program of a kernel to the first of the next one, in a
            CUDA graph.
        dependent_start: seconds after a kernel's first program until those of a programmatic
            dependent launch start; assumed.
        dependent_end: seconds from a kernel's end until one that waits for it goes on; assumed.
        l1_bytes: bytes of L1 that shared memory leaves. A multiprocessor has 256 KB for both, and
            Triton asks the driver to prefer shared memory (228 KB) where a program has more
            than 48 KB.
    """

    clock: float = 1.755e9
    l2_bandwidth: float = 5.5e12
    link: float = 64
    hbm_latency: int = 600
    l2_latency: int = 262
    l1_latency: int = 40
    shared_latency: int = 29
    shuffle_latency: int = 25
    barrier_latency: int = 15
    read_latency: int = 14
    alu: int = 2
    fma: int = 2
    hmma: int = 8
    wgmma_per_column: float = 0.5
    wgmma_latency: int = 32
    lsu_bytes: int = 128
    queue: int = 48
    program_start: int = 500
    launch_gap: float = 1.0e-6
    dependent_start: float = 0.4e-6
    dependent_end: float = 0.2e-6
    l1_bytes: int = 28 << 10


TYPICAL = Machine()

BF16_FIXED = 2.0e-6
"""Seconds of a bf16 product on top of its bytes at copy speed: launch gap, ramp-up, ramp-down."""
BF16_FLOPS = 650e12
"""Multiplications and additions per second that a good bf16 product reaches on both GPUs."""


def bf16_seconds(num_rows: int, num_inputs: int, num_tokens: int, gpu: Gpu) -> float:
    """The reference: a vendor's product with bf16 weights, bound by memory or by arithmetic."""
    elements = num_rows * num_inputs + num_tokens * (num_rows + num_inputs)
    arithmetic = 2 * num_rows * num_inputs * num_tokens / BF16_FLOPS
    return BF16_FIXED + max(2 * elements / gpu.copy, arithmetic)
