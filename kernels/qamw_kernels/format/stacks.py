"""Tensors that do not hold just one matrix [N, K], and the matrices in them.

Such a tensor, a *stack*, may hold a matrix of every expert of a layer. In a quantized checkpoint
every expert has tensors of its own: experts may differ in which matrices are not quantized, and
vLLM reads them one by one. Or a stack holds a single matrix, transposed. Dequantizing restores the
stacks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slice:
    """Where a matrix or a bias is in a stack.

    Attributes:
        expert: index along the first dimension; None for a tensor that is one matrix.
        rows: rows of the matrix after any transposition is undone; for a bias, its elements.
        transposed: whether the stack has [inputs, rows] for every expert.
    """

    expert: int | None
    rows: slice
    transposed: bool = False

    def of(self, stack: torch.Tensor) -> torch.Tensor:
        """The view of a stack that is this matrix [N, K], or this bias [N]."""
        part = stack if self.expert is None else stack[self.expert]
        return (part.T if self.transposed else part)[self.rows]


@dataclass(frozen=True)
class Stack:
    """One tensor of the checkpoint: [experts, ...], or [K, N].

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        slices: name that a matrix or bias would have as a tensor of its own -> where it is.
    """

    name: str
    shape: tuple[int, ...]
    slices: Mapping[str, Slice]

    def split(self, stack: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Names of all matrices or biases, and views of them."""
        for name, part in self.slices.items():
            yield name, part.of(stack)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of one matrix or bias."""
        return tuple(self.slices[name].of(torch.empty(self.shape, device="meta")).shape)

    def join(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor with these values, by name; it has their dtype."""
        first = values[next(iter(self.slices))]
        stack = first.new_empty(self.shape)
        for name, part in self.split(stack):
            part.copy_(values[name])
        return stack


def transposed_matrix(name: str, shape: tuple[int, ...]) -> Stack:
    """A tensor [K, N] that holds one matrix of ``shape`` [N, K], which has the same name."""
    return Stack(name, shape[::-1], {name: Slice(None, slice(None), transposed=True)})


def block_of(stack: str) -> str:
    """The name of the module of experts whose matrices a tensor holds, with a dot at its end."""
    block = stack.removesuffix(".weight").rpartition(".")[0]
    return f"{block}." if block.endswith(".experts") else f"{block}.experts."


def name_apart(stack: str, expert: int, part: str) -> str:
    """The name of an expert's matrix or bias as a tensor of its own, as most checkpoints have it.

    Args:
        stack: name of the tensor that holds it, as ``mlp.experts.gate_up_proj``.
        part: ``gate_proj.weight``, for example.
    """
    return f"{block_of(stack)}{expert}.{part}"
