"""The allocation of index bits, against a search over all choices."""

import itertools

import pytest
import torch

from offline_quantize.planning.allocation import allocate


def test_allocation_is_the_best_there_is() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        sensitivities = (torch.randn(4, generator=generator) * 2).exp().tolist()
        sizes = [8, 8, 8, 8]
        budget = 8 * int(torch.randint(26, 46, (1,), generator=generator))

        def cost(bits: tuple[int, ...], sensitivities: list[float] = sensitivities) -> float:
            return sum(s * 2.0**-b for s, b in zip(sensitivities, bits, strict=True))

        choices = itertools.product(range(6, 13), repeat=4)
        best = min((bits for bits in choices if 8 * sum(bits) <= budget), key=cost)
        chosen = allocate(sensitivities, sizes, budget)
        assert 8 * sum(chosen) <= budget and cost(tuple(chosen)) == pytest.approx(cost(best))
    assert allocate([1.0, 1.0], [4, 4], 1000) == [12, 12]
    assert allocate([0.0, 1.0], [4, 4], 4 * 18) == [6, 12]
