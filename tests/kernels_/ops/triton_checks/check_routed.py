"""The routed linear layer on the kernels, against a plain loop over experts."""

import pytest
import torch

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.format.codebook import TRELLIS
from qamw_kernels.ops import reference
from qamw_kernels.ops.launcher import ON_DEVICE
from qamw_kernels.ops.linear import combine, routed_linear
from qamw_kernels.ops.routing import sort_slots
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.triton.rotate_launch import rotate, rotate_many
from qamw_kernels.ops.weight import Rate, TiledWeight
from tests.kernels_.ops.triton_checks.common import DEVICE, NUM_ROWS, random, random_weight

NUM_EXPERTS, TOP_K = 6, 2
CLOSE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}


def choose_experts(num_tokens: int) -> torch.Tensor:
    """[T, TOP_K] int32; the last expert is never chosen."""
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(NUM_EXPERTS - 1, generator=generator) for _ in range(num_tokens)]
    chosen = torch.zeros(num_tokens, TOP_K, dtype=torch.int32)
    for token, order in enumerate(orders):
        chosen[token] = order[:TOP_K]
    return chosen.to(DEVICE)


@pytest.mark.parametrize(
    "case",
    [
        (Rate(11), 64, 1, torch.bfloat16),
        (Rate(8), 128, 5, torch.float16),
        (Rate(6), 16, 40, torch.bfloat16),
        (Rate(12), 64, 7, torch.float32),
        (Rate(9), 64, 0, torch.bfloat16),
        (Rate(11, TRELLIS), 64, 3, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("parallel", [False, True])
def test_routed_linear(case: tuple[Rate, int, int, torch.dtype], parallel: bool) -> None:
    """Experts of which some get no token; with expert parallelism some are on another rank."""
    rate, size, num_tokens, dtype = case
    num_inputs = 192 if size == 64 else 256
    weights = [
        random_weight(NUM_ROWS, num_inputs, rate.index_bits, size, seed, rate.code)
        for seed in range(NUM_EXPERTS)
    ]
    for weight in weights:
        weight.input_scales.copy_(weights[0].input_scales)
    chosen = choose_experts(num_tokens)
    here = [e for e in range(NUM_EXPERTS) if not parallel or e % 2]
    numbers = [here.index(e) if e in here else -1 for e in range(NUM_EXPERTS)]
    expert_map = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    tiled = TiledWeight.of_experts([weights[e] for e in here])
    expert_map = expert_map if parallel else None
    processor = ON_DEVICE.processor(chosen.device)
    for block_size in sorted(launch.routed_block_sizes(dtype, rate, processor)):
        routing = sort_slots(chosen, block_size, NUM_EXPERTS, expert_map)
        # Behind the first layer of an expert, each slot has an activation of its own.
        for num_activations in (num_tokens, num_tokens * TOP_K):
            x = random(num_activations, num_inputs, dtype=dtype)
            y = routed_linear(x, tiled, routing, num_tokens * TOP_K)
            assert y.shape == (num_tokens * TOP_K, NUM_ROWS)
            for slot, expert in enumerate(chosen.flatten().tolist()):
                if expert in here:
                    activation = x[slot * len(x) // len(y)].double()
                    exact = decode_weight(weights[expert]).double() @ activation
                    assert (y[slot].double() - exact).norm() < CLOSE[dtype] * exact.norm()
                else:
                    assert not y[slot].any()


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("slots_per_token", [1, TOP_K])
def test_sorted_tokens_are_rotated(size: int, slots_per_token: int) -> None:
    """As all tokens are, and then brought in the order of the slots; padding is left out."""
    chosen, dtype = choose_experts(9), torch.bfloat16
    weight = TiledWeight.of(random_weight(1, 256, 8, size))
    x = random(chosen.numel() // slots_per_token, 256, dtype=dtype)
    routing = sort_slots(chosen, 8, NUM_EXPERTS)
    found = torch.full((len(routing.slots), 256), 7, dtype=dtype, device=DEVICE)
    rotate_many(x, weight.input_scales, size, found, routing, chosen.numel())
    rotated = rotate(x, weight.input_scales, size, swapped=True)
    used = (routing.slots < chosen.numel()).nonzero().flatten()
    assert len(used) == chosen.numel()
    padding = torch.ones(len(found), dtype=torch.bool, device=DEVICE)
    padding[used] = False
    assert (found[padding] == 7).all()
    assert torch.equal(found[used], rotated[routing.slots[used].long() // slots_per_token])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("num_tokens, num_rows", [(3, NUM_ROWS), (1, 1040), (0, 16)])
def test_combine(num_tokens: int, num_rows: int, dtype: torch.dtype) -> None:
    y, shares = random(num_tokens * 3, num_rows, dtype=dtype), random(num_tokens, 3, seed=2)
    found = combine(y, shares)
    exact = (y.double().view(num_tokens, 3, num_rows) * shares.double()[..., None]).sum(1)
    assert found.dtype == dtype and found.shape == (num_tokens, num_rows)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=1e-5)
    torch.testing.assert_close(found, reference.combine(y, shares), rtol=step, atol=1e-5)
