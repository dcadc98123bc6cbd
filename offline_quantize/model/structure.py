"""What is known of a model: its decoder layers, their linears, its head."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from offline_quantize.model.checkpoint import Checkpoint
from qamw_kernels.format.config import role_of
from qamw_kernels.format.stacks import Stack


@dataclass(frozen=True)
class Linear:
    """A matrix of the checkpoint: its tensor's name without ``.weight``, and its shape.

    Attributes:
        modules: names of the model's ``nn.Linear`` whose weight, or a part of it, this matrix is.
        row_parallel: True where vLLM may cut the inputs between tensor-parallel ranks.
        reads: name of the first linear that reads the same input: they have one Hessian. All
            experts of a layer read the same input, but each gets only some of its tokens.
    """

    name: str
    num_rows: int
    num_inputs: int
    row_parallel: bool
    reads: str
    modules: tuple[str, ...]

    @property
    def weight_name(self) -> str:
        """Name of the tensor with its weight."""
        return f"{self.name}.weight"

    @property
    def num_weights(self) -> int:
        """N * K."""
        return self.num_rows * self.num_inputs

    @property
    def routed(self) -> bool:
        """Whether it belongs to an expert, which does not get every token."""
        return role_of(self.name) != self.name

    @property
    def counted(self) -> bool:
        """Whether its input adds to the Hessian: among linears that read the same, the first does.

        So every token counts once, and for experts once for each expert that it is sent to.
        """
        return role_of(self.name) == role_of(self.reads)


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one activation, or that have one role in all experts of a layer.

    They share input scales and rate.
    """

    linears: tuple[Linear, ...]

    @classmethod
    def of(cls, linears: Sequence[Linear]) -> "InputGroup":
        """A group of only some of the linears of a group.

        Unless they are routed, the first of them becomes the one that counts tokens.
        """
        if linears[0].routed:
            return cls(tuple(linears))
        reads = linears[0].name
        return cls(tuple(dataclasses.replace(linear, reads=reads) for linear in linears))

    def __iter__(self) -> Iterator[Linear]:
        return iter(self.linears)

    @property
    def name(self) -> str:
        """Name of the first linear."""
        return self.linears[0].name

    @property
    def num_inputs(self) -> int:
        """K of every linear."""
        return self.linears[0].num_inputs

    @property
    def num_weights(self) -> int:
        """Of all linears together."""
        return sum(linear.num_weights for linear in self.linears)

    @property
    def routed(self) -> bool:
        """Whether the linears belong to experts."""
        return self.linears[0].routed


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: its module name, its position, and its input groups.

    Attributes:
        tensors: names of the checkpoint's tensors that belong to it.
        stacks: those of them that hold the weights of several linears.
    """

    name: str
    index: int
    groups: tuple[InputGroup, ...]
    tensors: tuple[str, ...]
    stacks: tuple[Stack, ...] = ()

    def linears(self) -> Iterator[Linear]:
        """The linears of all groups."""
        for group in self.groups:
            yield from group

    def with_groups(self, groups: Iterable[InputGroup]) -> "DecoderLayer":
        """The same layer with some of its groups, and the stacks whose linears are all in these."""
        groups = tuple(groups)
        weights = {linear.weight_name for group in groups for linear in group}
        stacks = tuple(stack for stack in self.stacks if weights >= stack.slices.keys())
        return dataclasses.replace(self, groups=groups, stacks=stacks)

    @property
    def num_weights(self) -> int:
        """Of all linears together."""
        return sum(group.num_weights for group in self.groups)

    def input_widths(self) -> dict[str, int]:
        """Number of inputs K of every activation that linears read, by :attr:`Linear.reads`."""
        return {linear.reads: linear.num_inputs for linear in self.linears()}

    def load(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of this layer, by name; stacks are taken apart.

        Raises:
            TensorError: a tensor is not finite.
        """
        tensors = dict(checkpoint.load_finite(self.tensors))
        for stack in self.stacks:
            tensors |= stack.split(tensors.pop(stack.name))
        return tensors


class Kept(NamedTuple):
    """Matrices of a decoder layer that stay as they are."""

    reason: str
    num_weights: int


@dataclass(frozen=True)
class Structure:
    """The decoder layers of a model, and its head.

    Attributes:
        layers_name: module name of the list of decoder layers.
        layers: the decoder layers, in order.
        num_heads: attention heads, between which vLLM cuts; None where config.json has no number.
        num_kv_heads: the same, of keys and values.
        kv_rows: rows of a key projection, which vLLM replicates rather than cuts when there are
            more ranks than key heads.
        head: the linear that makes logits; None for a model without one.
        head_source: the tensor with the head's weight, which may be that of the embeddings.
        embeddings: the tensor of the embeddings.
        tied: parameters of the decoder layers without a tensor of their own, and the embeddings
            where only the head has one -> the tensor of another parameter that they use.
        stored_twice: pairs of tensors that config.json says are one.
        architecture: the model's class in transformers.
        context: the most tokens that the model can read; None where config.json has no number.
        state_width: numbers of the hidden states of one token at a layer's input; more than the
            hidden size where a token has several states (Gemma 3n, DeepSeek-V4).
        expected: name -> shape of every tensor that a checkpoint must have.
        stacks: name -> those of them that hold several matrices or biases, or a transposed matrix;
            a QAM-W checkpoint has the matrices apart.
        unwanted: tensors of the checkpoint that the model does not use.
        kept: tensors of the decoder layers with matrices that cannot be quantized, or are not worth
            it -> the reason, and how many weights these have.
    """

    layers_name: str
    layers: tuple[DecoderLayer, ...]
    num_heads: int | None
    num_kv_heads: int | None
    kv_rows: int | None
    head: Linear | None
    head_source: str
    embeddings: str
    tied: Mapping[str, str]
    stored_twice: tuple[tuple[str, str], ...]
    architecture: str
    context: int | None
    state_width: int
    expected: Mapping[str, tuple[int, ...]]
    stacks: Mapping[str, Stack]
    unwanted: tuple[str, ...]
    kept: Mapping[str, Kept]

    @property
    def kept_share(self) -> float:
        """Share of the weights of all matrices in the decoder layers that stay as they are."""
        num_kept = sum(kept.num_weights for kept in self.kept.values())
        return num_kept / max(1, num_kept + sum(layer.num_weights for layer in self.layers))

    def linears(self) -> Iterator[Linear]:
        """The linears of all decoder layers; not the head."""
        for layer in self.layers:
            yield from layer.linears()
