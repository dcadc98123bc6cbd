"""Speed of the encoder on this machine: ``python -m benchmarks.kernels.encode``.

Best of several runs, in million weights a second. First compares the nearest codewords that are
found with those of a brute-force search, and prints no speed if they differ.
"""

import functools
import time
from collections.abc import Callable

import torch

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.codec.nearest import nearest, nearest_brute_force
from qamw_kernels.format.codebook import INDEX_BITS

ROWS, INPUTS, RUNS = 2048, 2048, 7
ROTATION_BLOCK_SIZE = 128
CHECKED = 50_000
"""Pairs that are compared with a search over the whole codebook."""


def speed(work: Callable[[], object]) -> float:
    """Million weights a second, of the fastest run; one more before them warms up."""
    work()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return ROWS * INPUTS / min(seconds) / 1e6


def main() -> None:
    torch.manual_seed(0)
    weight, scales = torch.randn(ROWS, INPUTS), make_input_scales(INPUTS)
    points = weight.view(-1, 2)
    some = points[:CHECKED]
    threads = torch.get_num_threads()
    print(f"{threads} threads, torch {torch.__version__}; million weights a second")
    print(f"{'b':>3} {'nearest':>9} {'encode':>9} {'decode':>9}")
    for bits in INDEX_BITS:
        if not torch.equal(nearest(some, bits), nearest_brute_force(some, bits)):
            raise SystemExit(f"b = {bits}: nearest differs from brute force, no speed is given")
        encode = functools.partial(encode_weight, weight, bits, ROTATION_BLOCK_SIZE, scales)
        search = functools.partial(nearest, points, bits)
        decode = functools.partial(decode_weight, encode())
        print(f"{bits:3}", *(f"{speed(work):9.1f}" for work in (search, encode, decode)))


if __name__ == "__main__":
    main()
