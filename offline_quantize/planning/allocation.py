"""Which layers get how many bits: from sensitivities to the index bits of every input group."""

import heapq
from collections.abc import Sequence

from qamw_kernels.format.codebook import INDEX_BITS


def allocate(sensitivities: Sequence[float], sizes: Sequence[int], num_bits: float) -> list[int]:
    """Index bits of every group, so that the sum of ``sensitivity * 2 ** -bits`` is least.

    One bit more halves the distortion of a group.

    Args:
        sensitivities: per group, what a unit of distortion costs.
        sizes: pairs per group.
        num_bits: index bits to spend, in all.
    """
    bits = [INDEX_BITS.start] * len(sizes)
    left = num_bits - sum(INDEX_BITS.start * size for size in sizes)
    # What the next bit saves, per pair; each further bit saves half as much.
    queue = [(-s / size, i) for i, (s, size) in enumerate(zip(sensitivities, sizes, strict=True))]
    heapq.heapify(queue)
    while queue:
        saving, i = heapq.heappop(queue)
        if sizes[i] <= left:
            bits[i] += 1
            left -= sizes[i]
            if bits[i] + 1 in INDEX_BITS:
                heapq.heappush(queue, (saving / 2, i))
    return bits
