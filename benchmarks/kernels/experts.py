"""Speed of a quantized mixture of experts against reading and multiplying it in bfloat16.

    python -m benchmarks.kernels.experts [OUT.json] [--index-bits 11] [--tokens 1 8 ...]

Measures both products of all experts, with rotations, without routing and without the activation
between the products. Tokens are sent to random experts, all equally likely. Every time is a median
over CUDA graphs with many choices of experts, more than the L2 cache can hold. The reference is
vLLM's fused_experts in bfloat16, where vLLM is installed. First compares some results with float64,
and reports no speed if one is wrong. Without a GPU and with TRITON_INTERPRET=1, only the comparison
runs.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.check import DTYPE, LARGEST_ERROR, exact, random_weight
from benchmarks.kernels.linear import RESULTS, copy_bandwidth, environment, microseconds
from benchmarks.kernels.mixture import MIXTURES, Mixture
from qamw_kernels.ops.interpreter import interpreted
from qamw_kernels.ops.routing import Routing, sort_slots
from qamw_kernels.ops.triton import launch
from qamw_kernels.ops.weight import TiledWeight

TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
CHECKED_SLOTS = 8
CHOICES = 16
"""Choices of experts that are measured in turn, so that L2 does not hold the experts of the next:
16 choices of 8 experts of Qwen3-30B-A3B read 130 MB and more of a packed weight."""


def random_experts(
    count: int, num_rows: int, num_inputs: int, bits: int, device: str
) -> TiledWeight:
    """A weight of ``count`` experts."""
    all_rows = random_weight(count * num_rows, num_inputs, bits, device)
    if num_rows % 16:
        raise ValueError(f"num_rows: expected a multiple of 16, got {num_rows}")
    return all_rows._replace(
        tiles=all_rows.tiles.view(count, num_rows // 16, *all_rows.tiles.shape[1:]),
        row_norms=all_rows.row_norms.view(count, num_rows),
    )


def choose(mixture: Mixture, num_tokens: int, device: str) -> torch.Tensor:
    """Experts [num_tokens, top_k] int32 of every token."""
    scores = torch.rand(num_tokens, mixture.experts, device=device)
    return scores.topk(mixture.top_k, 1).indices.int()


def route(chosen: torch.Tensor, mixture: Mixture, weights: list[TiledWeight]) -> Routing:
    """Slots in the blocks that the kernels want."""
    size = launch.routed_block_size(chosen.numel(), mixture.experts, DTYPE, weights)
    return sort_slots(chosen, size, mixture.experts)


def check(mixture: Mixture, index_bits: int, tokens: list[int], device: str) -> None:
    """Stop the program if a result is further from the exact one than bfloat16 explains."""
    weight = random_experts(mixture.experts, 256, mixture.inner, index_bits, device)
    for num_tokens in tokens:
        chosen = choose(mixture, num_tokens, device)
        x = torch.randn(num_tokens, mixture.inner, dtype=DTYPE, device=device)
        y = launch.routed_linear(x, weight, route(chosen, mixture, [weight]), chosen.numel())
        slots = torch.randperm(chosen.numel())[:CHECKED_SLOTS].tolist()
        for slot in slots:
            expert = int(chosen.flatten()[slot])
            token = slot // mixture.top_k
            expected = exact(weight.expert(expert), x[token : token + 1])[0]
            error = (y[slot].double() - expected).norm() / expected.norm()
            if not error < LARGEST_ERROR:
                sys.exit(
                    f"{num_tokens} tokens, slot {slot} of expert {expert}, {index_bits} index "
                    f"bits: relative error {float(error):.2g}, no speed is given"
                )


def fused_experts() -> Callable[..., Any] | str:
    """vLLM's experts in bfloat16, or why there are none."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts as of_vllm
    except Exception as error:  # not installed, or not for this GPU
        return f"{type(error).__name__}: {error}"
    return of_vllm


def measure(mixture: Mixture, index_bits: int, tokens: list[int]) -> list[dict[str, Any]]:
    """One row per number of tokens."""
    shapes = mixture.shapes.values()
    weights = [random_experts(mixture.experts, *shape, index_bits, "cuda") for shape in shapes]
    plain = [torch.randn(mixture.experts, *s, dtype=DTYPE, device="cuda") / 64 for s in shapes]
    reference, rows = fused_experts(), []
    for num_tokens in tokens:
        choices = [choose(mixture, num_tokens, "cuda") for _ in range(CHOICES)]
        routings = [route(chosen, mixture, weights) for chosen in choices]
        num_slots = choices[0].numel()
        x = torch.randn(num_tokens, mixture.hidden, dtype=DTYPE, device="cuda")
        inner = torch.randn(num_slots, mixture.inner, dtype=DTYPE, device="cuda")
        hit = sum(len(chosen.unique()) for chosen in choices) / CHOICES
        row: dict[str, Any] = {"num_tokens": num_tokens, "experts_hit": hit}
        row["block_size"] = routings[0].block_size
        for name, weight, of in zip(("w13", "w2"), weights, (x, inner), strict=True):
            calls = [
                functools.partial(launch.routed_linear, of, weight, routing, num_slots)
                for routing in routings
            ]
            row[f"{name}_us"], row[f"{name}_spread_us"] = microseconds(calls)
        if callable(reference):
            shares = torch.full(choices[0].shape, 1 / mixture.top_k, device="cuda")
            calls = [functools.partial(reference, x, *plain, shares, c) for c in choices]
            row["vllm_bf16_us"], row["vllm_bf16_spread_us"] = microseconds(calls)
        print(row, flush=True)
        rows.append(row)
    if not callable(reference):
        rows.append({"vllm_bf16_not_measured": reference})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        default=RESULTS / "experts.json",
        help="JSON to write (default: benchmarks/kernels/results/experts.json)",
    )
    parser.add_argument("--mixtures", nargs="+", choices=list(MIXTURES), default=list(MIXTURES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--index-bits", type=int, default=11)
    args = parser.parse_args()
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        if not interpreted():
            sys.exit(
                "no GPU: nothing to measure. "
                "TRITON_INTERPRET=1 runs the comparison with float64 alone."
            )
        check(Mixture(4, 2, 128, 128), args.index_bits, [1, 40], "cpu")
        print("no GPU: results agree with float64; no speed was measured")
        return
    for bits in {8, args.index_bits}:
        check(MIXTURES["qwen3-30b-a3b"], bits, args.tokens, "cuda")
    result = {
        "environment": environment(),
        "index_bits": args.index_bits,
        "copy_bytes_per_second": copy_bandwidth(),
        "mixtures": {
            name: measure(MIXTURES[name], args.index_bits, args.tokens) for name in args.mixtures
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
