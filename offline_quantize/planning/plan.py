"""What will be done to a checkpoint: rates, rotation, shards, tensor parallelism.

A plan is decided from config.json and the headers of the shards; no tensor is read.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from offline_quantize.errors import Option, QuantizeError
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint, TensorInfo
from offline_quantize.model.encoded import describe
from offline_quantize.model.structure import DecoderLayer, Linear, Structure
from offline_quantize.planning.request import DEFAULT_REQUEST, QuantizeRequest
from offline_quantize.planning.selection import (
    check_complete,
    check_share,
    check_tensors,
    select_head,
    select_layers,
    unquantized_matrices,
    vllm_architecture,
)
from offline_quantize.planning.served import as_served
from offline_quantize.planning.shards import Shard, make_shards
from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.format.config import QUANT_METHOD, QamwFormat, layer_tensors, role_of
from qamw_kernels.format.rates import (
    MIN_BITS_PER_WEIGHT,
    QuantizedShape,
    effective_bits_per_weight,
    index_bits_within,
    is_nominal,
    nominal_bits_per_weight,
)
from qamw_kernels.format.sharding import (
    can_split_inputs,
    can_split_rows,
    choose_rotation_block_sizes,
    possible_tensor_parallel_sizes,
)

HEAD_INDEX_BITS = 12  # of the head, whose errors reach every logit


@dataclass(frozen=True)
class Plan:
    """Every decision about one run.

    Attributes:
        request: what was asked for.
        structure: of the model.
        layers: all decoder layers, with the input groups that are quantized.
        head: the model's head if it is quantized too, at HEAD_INDEX_BITS; rates, sizes and counts
            of weights are those of the decoder layers alone.
        format: the ``quantization_config`` of the result.
        shards: the output files.
        tensor_parallel_sizes: the sizes up to ``tp_max`` that the result can be served with.
    """

    request: QuantizeRequest
    checkpoint: Checkpoint
    structure: Structure
    layers: tuple[DecoderLayer, ...]
    head: Linear | None
    format: QamwFormat
    shards: tuple[Shard, ...]
    tensor_parallel_sizes: tuple[int, ...]

    def with_rates(self, index_bits: Sequence[Sequence[int]]) -> "Plan":
        """The same plan with these index bits for every input group of every layer."""
        rates = {
            role_of(linear.name): bits
            for layer, chosen in zip(self.layers, index_bits, strict=True)
            for group, bits in zip(layer.groups, chosen, strict=True)
            for linear in group
        }
        usual = max(INDEX_BITS, key=list(rates.values()).count)
        own = {name: bits for name, bits in rates.items() if bits != usual}
        fmt = dataclasses.replace(
            self.format,
            index_bits=usual,
            codebooks={},
            layer_index_bits=own | _head_rate(self.head),
        )
        return dataclasses.replace(self, format=fmt).with_shards()

    def with_shards(self) -> "Plan":
        """The same plan with the output files that its format leads to."""
        names_by_layer = [layer.tensors for layer in self.layers]
        in_layers = {name for names in names_by_layer for name in names}
        outside = [name for name in self.checkpoint.tensors if name not in in_layers]
        if self.head:  # comes last; without a weight of its own it is not among the tensors
            outside = [name for name in outside if name != self.head.weight_name]
            outside.append(self.head.weight_name)
        shards = make_shards(
            [self.written(names) for names in names_by_layer],
            self.written(outside),
            self.request.max_shard_bytes,
        )
        return dataclasses.replace(self, shards=shards)

    def linears(self) -> Iterator[Linear]:
        """What is quantized in the decoder layers."""
        for layer in self.layers:
            yield from layer.linears()

    def shape_of(self, linear: Linear) -> QuantizedShape:
        """Shape and rate of a linear that is quantized."""
        index_bits = self.format.index_bits_of(linear.name)
        return QuantizedShape(linear.num_rows, linear.num_inputs, index_bits, self.format.code)

    def output_tensors(self, linear: Linear) -> list[TensorInfo]:
        """The tensors that replace a linear's weight."""
        shape = self.shape_of(linear)
        tensors = layer_tensors(shape.num_rows, shape.num_inputs, shape.index_bits)
        return [
            TensorInfo(f"{linear.name}.{suffix}", "", shape, dtype)
            for suffix, (shape, dtype) in tensors.items()
        ]

    @functools.cached_property
    def quantized(self) -> Mapping[str, Sequence[Linear]]:
        """Tensor of the checkpoint -> the linears whose weights it holds."""
        linears = {linear.weight_name: linear for linear in self.linears()}
        if self.head:
            linears[self.head.weight_name] = self.head
        stacks = {stack.name: stack for layer in self.layers for stack in layer.stacks}
        stacked = {name: [linears.pop(x) for x in stack.slices] for name, stack in stacks.items()}
        return stacked | {name: [linear] for name, linear in linears.items()}

    def written(self, names: Iterable[str]) -> list[TensorInfo]:
        """What is written for tensors of the checkpoint, or of a head that has none there."""
        return [
            info
            for name in names
            for info in (
                chain.from_iterable(map(self.output_tensors, self.quantized[name]))
                if name in self.quantized
                else [self.checkpoint.tensors[name]]
            )
        ]

    def load_head(self) -> torch.Tensor:
        """The weight [vocabulary, hidden size] of the head, from the embeddings if it is tied.

        Raises:
            TensorError: it is not finite.
        """
        return next(self.checkpoint.load_finite([self.structure.head_source]))[1]

    @property
    def widest(self) -> int:
        """Inputs of the widest linear."""
        return max(linear.num_inputs for linear in self.linears())

    @property
    def calibration_tokens(self) -> int:
        """The most tokens of the calibration text that are read; 0 without calibration."""
        if self.request.calibration is None:
            return 0
        return self.request.calibration_tokens or self.request.default_tokens(self.widest)

    @property
    def window_tokens(self) -> int:
        """Tokens of the calibration text that are read together."""
        return min(self.request.window_tokens, self.structure.context or sys.maxsize)

    @property
    def vocabulary_tensor(self) -> str:
        """The weight with a row for every token: of the head, or of the embeddings without one."""
        return self.structure.head_source or self.structure.embeddings

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.checkpoint.tensors[self.vocabulary_tensor].shape[0]

    @property
    def num_quantized_weights(self) -> int:
        """Of the decoder layers."""
        return sum(layer.num_weights for layer in self.layers)

    @property
    def nominal_bits_per_weight(self) -> float:
        """What the indices take, per quantized weight."""
        shapes = [self.shape_of(linear) for linear in self.linears()]
        index_bits = sum(shape.index_bits * shape.num_weights for shape in shapes)
        return nominal_bits_per_weight(index_bits / self.num_quantized_weights)

    @property
    def effective_bits_per_weight(self) -> float:
        """All stored bytes of the quantized layers, codebooks included, per quantized weight."""
        return effective_bits_per_weight(self.shape_of(linear) for linear in self.linears())

    @property
    def index_bit_budget(self) -> float:
        """Index bits of all pairs together that the requested rate allows.

        Rates in halves are nominal: they count only the indices. Any other rate is effective: it
        counts norms, scales and codebooks too.
        """
        bpw = self.request.bpw
        if not is_nominal(bpw):
            bpw = bpw - self.effective_bits_per_weight + self.nominal_bits_per_weight
        return bpw * self.num_quantized_weights

    @property
    def bytes_left(self) -> float:
        """Bytes that mixed rates may take beyond this plan's rates."""
        spent = self.nominal_bits_per_weight * self.num_quantized_weights
        return (self.index_bit_budget - spent) / 8

    @property
    def output_bytes(self) -> int:
        """Of the tensors that are written."""
        return sum(shard.num_bytes for shard in self.shards)


def make_plan(directory: Path, request: QuantizeRequest = DEFAULT_REQUEST) -> Plan:
    """Decide everything about quantizing a checkpoint; reads config.json and headers only.

    All layers get one rate, the highest that ``bpw`` allows; :meth:`Plan.with_rates` changes
    that once sensitivities are known.

    Raises:
        QuantizeError: the checkpoint cannot be quantized as asked; names the tensor and what to do.
    """
    checkpoint = Checkpoint(directory)
    _check_decodable(checkpoint)
    structure = find_structure(checkpoint)
    architecture = vllm_architecture(checkpoint, structure)
    structure = as_served(structure, architecture)
    check_complete(checkpoint, structure)
    check_share(structure, request.allow_partial)
    layers = select_layers(structure, request.ignore)
    linears = [linear for layer in layers for linear in layer.linears()]
    head = select_head(structure, architecture, request.quantize_lm_head)
    check_tensors(checkpoint, structure, architecture, linears, head)
    possible = possible_tensor_parallel_sizes(
        structure.num_heads, structure.num_kv_heads, request.tp_max
    )
    quantized = [*linears, head] if head else linears
    rotation_block_sizes = choose_rotation_block_sizes(
        ((linear.num_inputs, linear.row_parallel) for linear in quantized), possible
    )
    fmt = QamwFormat(
        index_bits_within(request.bpw),
        rotation_block_sizes,
        _head_rate(head),
        unquantized_matrices(checkpoint, linears, head),
        stacks={stack.name: stack.shape for layer in layers for stack in layer.stacks},
        code=request.code,
    )
    served = [
        tp
        for tp in possible
        if all(_can_split(linear, structure, rotation_block_sizes, tp) for linear in linears)
    ]
    plan = Plan(request, checkpoint, structure, layers, head, fmt, (), tuple(served))
    plan = plan.with_shards()
    _check_budget(plan)
    return plan


def _head_rate(head: Linear | None) -> dict[str, int]:
    return {head.name: HEAD_INDEX_BITS} if head else {}


def _check_decodable(checkpoint: Checkpoint) -> None:
    """Refuse what another method quantized, unless it is decoded while it is read."""
    if checkpoint.quantization.get("quant_method") == QUANT_METHOD:
        raise QuantizeError(
            f"{checkpoint.directory}: already a QAM-W checkpoint; start from the original model"
            f"{checkpoint.base_model()}, or from what qamw dequantize makes of this one"
        )
    if checkpoint.quantization and not checkpoint.encoding:
        raise QuantizeError(
            f"{checkpoint.directory}: already quantized with {describe(checkpoint.quantization)}, "
            "which qamw cannot decode; "
            f"start from the unquantized model{checkpoint.base_model()}"
        )


def _can_split(
    linear: Linear, structure: Structure, rotation_block_sizes: dict[int, int], tp: int
) -> bool:
    """Whether vLLM can divide a linear between ``tp`` ranks."""
    if linear.row_parallel:
        block_size = rotation_block_sizes[linear.num_inputs]
        return can_split_inputs(linear.num_inputs, tp, block_size)
    return can_split_rows(linear.num_rows, tp, structure.kv_rows)


def _check_budget(plan: Plan) -> None:
    """Refuse an effective rate that is too low even for the lowest nominal rate."""
    least = MIN_BITS_PER_WEIGHT
    if plan.index_bit_budget < least * plan.num_quantized_weights:
        effective = least + plan.effective_bits_per_weight - plan.nominal_bits_per_weight
        raise QuantizeError(
            Option("bpw", plan.request.bpw),
            f": expected at least {effective:.3f}: {least:g} for indices and the rest for norms, "
            "scales and codebooks; ",
            Option("bpw", least),
            " counts only the indices, and gives exactly this rate",
        )
