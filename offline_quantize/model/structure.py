"""The linears of a model that can be quantized: every matrix of its decoder layers' ``nn.Linear``.

The model is built without weights. One decoder layer at a time is run on meta tensors. Linears that
receive the very same tensor object form an input group: they share input scales and rotation, as
vLLM's fused layers need. So do the experts of a layer, which vLLM holds in one tensor.

Linears have the names and shapes of the checkpoint's matrices: one that is split while it is loaded
is one linear, and several that are merged are several.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import (
    build_empty_model,
    decoder_layers,
    name_of,
    set_parameters,
)
from offline_quantize.model.experts import Experts
from offline_quantize.model.tensor_map import TensorMap
from offline_quantize.model.tracing import (
    LayerCall,
    head_input,
    record_layer_calls,
    trace_layer,
)
from offline_quantize.model.wanted import unwanted
from qamw_kernels.format.config import role_of

# Of a decoder layer's parameters: below it, the weights that matter are not nn.Linear.
MIN_LINEAR_SHARE = 0.9


@dataclass(frozen=True)
class Linear:
    """A matrix of the checkpoint: its tensor's name without ``.weight``, and its shape.

    Attributes:
        modules: names of the ``nn.Linear`` of the model that it is the weight of, or a part.
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

        So every token counts once, and of experts once for each that it is sent to.
        """
        return role_of(self.name) == role_of(self.reads)


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one activation, or that have one role in all experts of a layer.

    They share input scales and rate.
    """

    linears: tuple[Linear, ...]

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
    """

    name: str
    index: int
    groups: tuple[InputGroup, ...]
    tensors: tuple[str, ...]

    def linears(self) -> Iterator[Linear]:
        """The linears of all groups."""
        for group in self.groups:
            yield from group

    @property
    def num_weights(self) -> int:
        """Of all linears together."""
        return sum(group.num_weights for group in self.groups)

    def input_widths(self) -> dict[str, int]:
        """Number of inputs K of every activation that linears read, by :attr:`Linear.reads`."""
        return {linear.reads: linear.num_inputs for linear in self.linears()}

    def load(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of this layer, by name.

        Raises:
            TensorError: a tensor is not finite.
        """
        return dict(checkpoint.load_finite(self.tensors))


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
        tied: what the decoder layers or the head have no tensor of their own for -> the tensor of
            another parameter that they use.
        stored_twice: pairs of tensors that config.json says are one.
        architecture: the model's class in transformers.
        expected: name -> shape of every tensor that a checkpoint must have.
        unwanted: tensors of the checkpoint that are nothing of the model's.
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
    expected: Mapping[str, tuple[int, ...]]
    unwanted: tuple[str, ...]

    def linears(self) -> Iterator[Linear]:
        """The linears of all decoder layers; not the head."""
        for layer in self.layers:
            yield from layer.linears()


def find_structure(checkpoint: Checkpoint) -> Structure:
    """Analyze the model of a plain or QAM-W checkpoint; no tensor is read.

    Raises:
        QuantizeError: the architecture is not known, cannot be traced, or has most of its weights
            elsewhere than in ``nn.Linear`` of repeated layers.
    """
    model, tensor_map = build_empty_model(checkpoint)
    layers_name, modules = decoder_layers(model)
    calls = _layer_calls(model, layers_name, modules)
    row_parallel = _row_parallel_names(model.config.get_text_config())
    layers = []
    for index, (module, call) in enumerate(zip(modules, calls, strict=True)):
        name = f"{layers_name}.{index}"
        try:
            groups = _input_groups(name, module, call, tensor_map, row_parallel)
        except QuantizeError as error:
            raise QuantizeError(
                f"unsupported architecture {type(model).__name__}: {error}"
            ) from error
        layers.append(DecoderLayer(name, index, groups, tuple(tensor_map.tensors_of(f"{name}."))))
    head, output = _head(model, tensor_map), model.get_output_embeddings()
    embeddings = f"{name_of(model, model.get_input_embeddings())}.weight"
    shared = tensor_map.shared()
    needed = {name for name in shared if name.startswith(f"{layers_name}.")}
    if output is not None and shared.get(embeddings) == f"{name_of(model, output)}.weight":
        needed.add(embeddings)
    return Structure(
        layers_name,
        tuple(layers),
        *_attention_heads(model.config.get_text_config()),
        head,
        tensor_map.tensor_of(f"{name_of(model, output)}.weight") if output is not None else "",
        tensor_map.tensor_of(embeddings),
        {name: tensor_map.tensor_of(name) for name in needed},
        tensor_map.stored_twice(),
        type(model).__name__,
        tensor_map.expected,
        unwanted(model, tensor_map),
    )


def _layer_calls(model: Any, layers_name: str, layers: nn.ModuleList) -> list[LayerCall]:
    """How the model calls its decoder layers, which are on the meta device, with four tokens.

    Raises:
        QuantizeError: the model cannot be called with decoder layers that pass their input
            through, as in calibration.
    """
    # Weights outside the layers are needed to call the model: one zero stands for all of a weight.
    set_parameters(
        model, lambda name, p: torch.zeros((), dtype=p.dtype).expand(p.shape), skip=layers_name
    )
    calls = record_layer_calls(model, layers, torch.zeros(1, 4, dtype=torch.long))
    if model.get_output_embeddings() is not None:
        head_input(model, layers, calls, calls[-1].hidden)
    layers.to("meta")
    return calls


def _row_parallel_names(config: Any) -> set[str] | None:
    """Last parts of the names of linears whose inputs may be cut; None: any linear's may be."""
    plan = type(config).base_model_tp_plan  # config.json may have anything there
    if not plan:
        return None
    # Not whole names: plans leave out whole blocks (shared experts, the attention of some models).
    names = {pattern.rpartition(".")[2] for pattern, style in plan.items() if "rowwise" in style}
    return names | {"o_proj", "down_proj"}


def _input_groups(
    layer_name: str,
    layer: nn.Module,
    call: LayerCall,
    tensor_map: TensorMap,
    row_parallel: set[str] | None,
) -> tuple[InputGroup, ...]:
    """The input groups of one decoder layer."""
    modules = _quantizable(layer)
    _check_linear_share(layer_name, layer, modules)
    with explained(f"{layer_name} cannot be traced"):
        traced = trace_layer(layer, call)
    groups = [[name for name in group if name in modules] for group in traced.inputs]
    called = {name for group in groups for name in group}
    groups += [[name] for name in modules if name not in called]

    by_role: dict[str, list[Linear]] = {}  # one for all that experts have in the same place
    for names in groups:
        matrices = _matrices(layer_name, dict.fromkeys(names), tensor_map)
        for name, (shape, parts) in matrices.items():
            reads = next(iter(matrices))
            inner = len(matrices) == 1 and role_of(name) != name  # what an expert computes itself
            last = parts[0].rpartition(".")[2]
            cut = inner or row_parallel is None or last in row_parallel
            linear = Linear(name, *shape, cut, reads, tuple(parts))
            by_role.setdefault(role_of(reads), []).append(linear)
    return tuple(InputGroup(tuple(linears)) for linears in by_role.values())


def _matrices(
    layer_name: str, modules: Iterable[str], tensor_map: TensorMap
) -> dict[str, tuple[tuple[int, int], list[str]]]:
    """The checkpoint's matrices that hold the weights of ``nn.Linear`` which read the same input.

    Args:
        modules: names inside the layer.
    Returns:
        Name of the matrix -> its shape, and the full names of the modules that it is the weight of.
    """
    found: dict[str, tuple[tuple[int, int], list[str]]] = {}
    read = {f"{layer_name}.{module}.weight" for module in modules}
    for parameter in (f"{layer_name}.{module}.weight" for module in modules):
        conversion = tensor_map.conversion_to(parameter)
        if (
            conversion is None
            or not conversion.keeps_inputs
            or not read >= conversion.parameters.keys()
        ):
            continue
        for tensor, shape in conversion.tensors.items():
            if len(shape) == 2 and tensor.endswith(".weight"):
                name = tensor.removesuffix(".weight")
                rows, inputs = shape
                found.setdefault(name, ((rows, inputs), []))[1].append(
                    parameter.removesuffix(".weight")
                )
    return found


def _quantizable(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a layer by their name inside it, except routers and gates beside experts."""
    blocks = {
        name.rpartition(".")[0] for name, m in layer.named_modules() if isinstance(m, Experts)
    }
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[0] not in blocks
    }


def _check_linear_share(layer_name: str, layer: nn.Module, modules: dict[str, nn.Linear]) -> None:
    total = sum(p.numel() for p in layer.parameters())
    in_linears = sum(m.weight.numel() for m in modules.values())
    if in_linears < MIN_LINEAR_SHARE * total:
        matrices = {name.rpartition(".")[0] for name, p in layer.named_parameters() if p.ndim > 1}
        raise QuantizeError(
            f"nn.Linear holds only {in_linears / total:.0%} of the weights of {layer_name}; "
            f"the rest is in {sorted(matrices - set(modules))}"
        )


def _attention_heads(config: Any) -> tuple[int | None, int | None, int | None]:
    """``num_heads``, ``num_kv_heads`` and ``kv_rows`` of :class:`Structure`."""
    num_heads = getattr(config, "num_attention_heads", None)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    try:
        head_dim = getattr(config, "head_dim", None)
        if not head_dim and num_heads:
            head_dim = config.hidden_size // num_heads
    except Exception:  # transformers has an error of its own for layers that differ in it (Gemma 4)
        head_dim = None
    kv_rows = num_kv_heads * head_dim if num_kv_heads and head_dim else None
    return num_heads, num_kv_heads, kv_rows


def _head(model: Any, tensor_map: TensorMap) -> Linear | None:
    output = model.get_output_embeddings()
    if output is None:
        return None
    module = name_of(model, output)
    conversion = tensor_map.conversion_to(f"{module}.weight")
    tensor = next(iter(conversion.tensors)) if conversion else f"{module}.weight"
    name = tensor.removesuffix(".weight")
    rows, inputs = output.weight.shape
    return Linear(name, rows, inputs, row_parallel=False, reads=name, modules=(module,))
