"""Speed of the encoder on this machine: ``python kernels/benchmarks/bench_encode.py``. Best of several runs, in million weights a second.

Checks first that the nearest codeword is the nearest, and prints no speed if it is not.
"""

import functools
import time
from collections.abc import Callable

import torch

from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.codec.encode import decode_weight, encode_weight, make_input_scales
from qamw_kernels.codec.nearest import nearest, nearest_brute_force

ROWS, INPUTS, RUNS = 2048, 2048, 7


def speed(work: Callable[[], object]) -> float:
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
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; million weights a second")
    print(f"{'b':>3} {'nearest':>9} {'encode':>9} {'decode':>9}")
    for bits in INDEX_BITS:
        if not torch.equal(nearest(points[:50_000], bits), nearest_brute_force(points[:50_000], bits)):
            raise SystemExit(f"b = {bits}: nearest differs from brute force, no speed is given")
        quantized = encode_weight(weight, bits, 128, scales)
        works = (functools.partial(nearest, points, bits), functools.partial(encode_weight, weight, bits, 128, scales),
                 functools.partial(decode_weight, quantized))
        print(f"{bits:3}", *(f"{speed(work):9.1f}" for work in works))


if __name__ == "__main__":
    main()
