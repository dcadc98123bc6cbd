"""Second moments of activations that are as hard to encode for as real ones."""

import torch


def correlated_hessian(num_inputs: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Second moment [K, K] float64 of inputs with strong correlations, and channels of very
    different size."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_inputs, num_inputs)
    mixing = torch.randn(shape, generator=generator, dtype=torch.float64) / num_inputs**0.5
    x = torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64)
    x = x @ (mixing + 0.3 * torch.eye(num_inputs))
    sizes = torch.logspace(-1, 1, num_inputs, dtype=torch.float64)
    x *= sizes[torch.randperm(num_inputs, generator=generator)]
    return x.T @ x / num_tokens


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """Sum over rows of the mean squared output error of a difference [..., K] of weights."""
    difference = difference.double()
    return float(((difference @ hessian) * difference).sum())
