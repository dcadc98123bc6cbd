"""Error feedback: pairs are coded in order, and each makes up for the errors of those before it.

Known as GPTQ (arXiv 2210.17323) and LDLQ (2307.13304). The output error of a coded row is
(u - q) H (u - q)^T with H the second moment of the layer's input, in the basis of the coordinates.
Let H = R R^T with R upper triangular in 2 x 2 blocks, and A = R diag(R)^-1. Then

    t_p = u_p + sum over i < p of (u_i - q_i) A[i, p]          q_p = codeword nearest to t_p
    error = sum over p of |(t_p - q_p) R[p, p]|^2

so only the errors of coding each t_p itself remain.
"""

from collections.abc import Callable

import torch

from qamw_kernels.codec.nearest import nearest
from qamw_kernels.codec.rotation import rotate
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import load_codebook

# Relative to the mean of the diagonal. Inputs that the calibration text does not have must not get
# large errors in favor of those that it has.
DAMPING = 0.1
LAZY_INPUTS = 128  # coordinates between two large matrix products


def shrink(hessian: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Shrink the correlations in a Hessian [K, K] in place: the fewer tokens, the more.

    Returns:
        ``hessian``; its diagonal stays.
    """
    diagonal = hessian.diagonal().clone()
    hessian.mul_(num_tokens / (num_tokens + len(hessian))).diagonal().copy_(diagonal)
    return hessian


def factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """R [K, K] upper triangular with R R^T = ``hessian`` + ``damping`` * mean diagonal * I.

    Damping accounts for inputs that a finite text does not show, and makes a rank-deficient Hessian
    positive definite. Where rounding errors still prevent a factorization, it is raised.

    Args:
        hessian: [K, K] float64, not all zeros.
    Returns:
        float64.
    Raises:
        TensorError: the Hessian is not finite.
    """
    if not hessian.isfinite().all():
        raise TensorError("the squares of the activations on the calibration text are not finite")
    mean = hessian.diagonal().mean()
    assert mean > 0, "no damping would make a Hessian of zeros definite"
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        root: torch.Tensor
        root, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return root.flip(0, 1)
        damping *= 10


def feedback_matrix(root: torch.Tensor) -> torch.Tensor:
    """A - I [K, K] float32 from R [K, K] float64.

    It holds what an error at input i (row) adds to the target of input j (column).
    """
    inverse = torch.linalg.inv(pair_blocks(root))
    matrix = torch.einsum("kpi,pij->kpj", root.view(len(root), -1, 2), inverse)
    matrix = matrix.reshape(root.shape)
    pair_blocks(matrix).zero_()
    return matrix.float()


def pair_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """The 2 x 2 blocks [P, 2, 2] on the diagonal of a matrix [K, K]; a view."""
    pairs = len(matrix) // 2
    return matrix.view(pairs, 2, pairs, 2).diagonal(dim1=0, dim2=2).movedim(2, 0)


def rotated_root(
    hessian: torch.Tensor,
    input_scales: torch.Tensor,
    rotation_block_size: int,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """R [K, K] float64 in the basis of the coordinates.

    Args:
        hessian: [K, K] float32, of the input as it is, neither scaled nor rotated.
        input_scales: [K] float16.
        order: [K] int64, in which coordinates are coded; None for the order of the inputs.
    Raises:
        TensorError: the Hessian is not finite.
    """
    scales = input_scales.to(hessian.device).double()
    basis = hessian.double() * scales[:, None] * scales
    for _ in range(2):
        basis = rotate(basis, rotation_block_size).T
    if order is not None:
        basis = basis[order][:, order]
    return factor(basis, DAMPING)


def feedback_coder(root: torch.Tensor, index_bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that codes coordinates [n, K] float32 as indices [n, P] int16, with feedback.

    Args:
        root: R [K, K] float64.
    """
    feedback = feedback_matrix(root)
    return lambda coordinates: encode_with_feedback(coordinates, feedback, index_bits)


def encode_with_feedback(
    coordinates: torch.Tensor, feedback: torch.Tensor, index_bits: int
) -> torch.Tensor:
    """Code coordinates with error feedback.

    Args:
        coordinates: [N, K] float32.
        feedback: [K, K] float32, of :func:`feedback_matrix`.
    Returns:
        indices [N, P] int16.
    """
    codebook = load_codebook(index_bits).to(coordinates.device)
    num_rows, num_inputs = coordinates.shape
    device = coordinates.device
    wanted = coordinates.T  # [K, N]: a pair is two contiguous rows
    error = torch.empty(num_inputs, num_rows, device=device)  # u - q
    indices = torch.empty(num_inputs // 2, num_rows, dtype=torch.int16, device=device)
    for start in range(0, num_inputs, LAZY_INPUTS):
        part = slice(start, min(start + LAZY_INPUTS, num_inputs))
        target = torch.addmm(wanted[part], feedback[:start, part].T, error[:start])
        local, errors = feedback[part, part], error[part]
        for i in range(0, len(target), 2):
            pair = slice(i, i + 2)
            chosen = nearest(target[pair].T, index_bits)
            indices[(start + i) // 2] = chosen
            codewords = codebook.index_select(0, chosen.int())
            torch.sub(wanted[start + i : start + i + 2], codewords.T, out=errors[pair])
            target[i + 2 :].addmm_(local[pair, i + 2 :].T, errors[pair])
    return indices.T.contiguous()


def encode_with_feedback_reference(
    coordinates: torch.Tensor, hessian: torch.Tensor, index_bits: int
) -> torch.Tensor:
    """Reference of :func:`encode_with_feedback`, derived in another way, and slow.

    After every pair, the best values of all later inputs are computed again. With the first pairs
    fixed, the error is a quadratic form in the rest; its minimum is the classical regression.

    Args:
        coordinates: [N, K] float64.
        hessian: [K, K] float64.
    Returns:
        indices [N, P] int16.
    """
    codebook = load_codebook(index_bits).double()
    target, chosen = coordinates.clone(), []
    for done in range(0, coordinates.shape[1], 2):
        chosen.append(nearest(target[:, done : done + 2].float(), index_bits))
        target[:, done : done + 2] = codebook[chosen[-1].int()]
        fixed, rest = slice(0, done + 2), slice(done + 2, None)
        error = coordinates[:, fixed] - target[:, fixed]
        regression = torch.linalg.solve(hessian[rest, rest], hessian[rest, fixed])
        target[:, rest] = coordinates[:, rest] + error @ regression.T
    return torch.stack(chosen, 1)
