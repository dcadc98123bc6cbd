"""The linears of a model that can be quantized: every ``nn.Linear`` in its decoder layers.

The model is built without weights. One decoder layer at a time is run on meta tensors. Linears that
receive the very same tensor object form an input group: they share input scales and rotation, as
vLLM's fused layers need. So do the experts of a layer, which vLLM holds in one tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import build_empty_model, decoder_layers, set_parameters
from offline_quantize.model.experts import Experts
from offline_quantize.model.tied import parameter_tensors, stored_parameters, stored_twice
from offline_quantize.model.tracing import (
    LayerCall,
    head_input,
    on_linear_inputs,
    record_layer_calls,
)
from offline_quantize.model.wanted import unwanted
from qamw_kernels.format.config import role_of

# Of a decoder layer's parameters: below it, the weights that matter are not nn.Linear.
MIN_LINEAR_SHARE = 0.9


@dataclass(frozen=True)
class Linear:
    """One ``nn.Linear``: its module name and its weight's shape [num_rows, num_inputs].

    Attributes:
        row_parallel: True where vLLM may cut the inputs between tensor-parallel ranks.
        reads: name of the first linear that reads the same input: they have one Hessian. All
            experts of a layer read the same input, but each gets only some of its tokens.
    """

    name: str
    num_rows: int
    num_inputs: int
    row_parallel: bool
    reads: str

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
    """One decoder layer: its module name, its position, and its input groups."""

    name: str
    index: int
    groups: tuple[InputGroup, ...]

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

    def tensor_names(self, checkpoint: Checkpoint) -> list[str]:
        """Names of the checkpoint's tensors that belong to this layer."""
        return [name for name in checkpoint.tensors if name.startswith(f"{self.name}.")]

    def load(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of this layer, by name.

        Raises:
            TensorError: a tensor is not finite.
        """
        return dict(checkpoint.load_finite(self.tensor_names(checkpoint)))


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
        tensors: every parameter -> the tensor with its values, which differs where it is tied.
        head: the linear that makes logits.
        embeddings: the tensor of the embeddings.
        stored_twice: pairs of tensors that config.json says are one.
        architecture: the model's class in transformers.
        shapes: of every parameter and every buffer that a checkpoint may have.
        unwanted: tensors of the checkpoint that are nothing of the model's.
    """

    layers_name: str
    layers: tuple[DecoderLayer, ...]
    num_heads: int | None
    num_kv_heads: int | None
    kv_rows: int | None
    tensors: Mapping[str, str]
    head: Linear
    embeddings: str
    stored_twice: tuple[tuple[str, str], ...]
    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    unwanted: tuple[str, ...]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Every tensor that a checkpoint must have."""
        return tuple(dict.fromkeys(self.tensors.values()))

    @property
    def head_source(self) -> str:
        """The tensor with the head's weight, which may be that of the embeddings."""
        return self.tensors[self.head.weight_name]

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
    model = build_empty_model(checkpoint)
    stored = stored_parameters(checkpoint)
    tensors = parameter_tensors(model, stored)
    layers_name, modules = decoder_layers(model)
    calls = _layer_calls(model, layers_name, modules)
    row_parallel = _row_parallel_names(model.config)
    layers = []
    for index, (module, call) in enumerate(zip(modules, calls, strict=True)):
        try:
            groups = _input_groups(f"{layers_name}.{index}", module, call, row_parallel)
        except QuantizeError as error:
            raise QuantizeError(
                f"unsupported architecture {type(model).__name__}: {error}"
            ) from error
        layers.append(DecoderLayer(f"{layers_name}.{index}", index, groups))
    return Structure(
        layers_name,
        tuple(layers),
        *_attention_heads(model.config.get_text_config()),
        tensors,
        _head(model),
        tensors[f"{_name_of(model, model.get_input_embeddings())}.weight"],
        stored_twice(model, stored),
        type(model).__name__,
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        unwanted(model, stored),
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
    head_input(model, layers, calls[-1].hidden)
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
    layer_name: str, layer: nn.Module, call: LayerCall, row_parallel: set[str] | None
) -> tuple[InputGroup, ...]:
    """The input groups of one decoder layer."""
    modules = _quantizable(layer)
    _check_linear_share(layer_name, layer, modules)
    with explained(f"{layer_name} cannot be traced"):
        traced = _names_by_input(layer, call)
    groups = [[name for name in group if name in modules] for group in traced]
    called = {name for group in groups for name in group}
    groups += [[name] for name in modules if name not in called]

    by_role: dict[str, list[Linear]] = {}  # one for all that experts have in the same place
    for names in filter(None, groups):
        reads = f"{layer_name}.{names[0]}"
        for name in dict.fromkeys(names):
            full = f"{layer_name}.{name}"
            inner = len(names) == 1 and role_of(full) != full  # what an expert computes itself
            cut = inner or row_parallel is None or name.rpartition(".")[2] in row_parallel
            rows, inputs = modules[name].weight.shape
            linear = Linear(full, rows, inputs, cut, reads)
            by_role.setdefault(role_of(reads), []).append(linear)
    return tuple(InputGroup(tuple(linears)) for linears in by_role.values())


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


def _names_by_input(layer: nn.Module, call: LayerCall) -> list[list[str]]:
    """Names inside the layer of the linears that receive the same tensor, in order of running."""
    by_input: dict[int, list[str]] = {}
    alive = []  # keeps ids unique while the layer runs

    def record(name: str, x: torch.Tensor) -> None:
        alive.append(x)
        by_input.setdefault(id(x), []).append(name)

    hidden, args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), call)
    with on_linear_inputs(layer, record), torch.no_grad():
        layer(hidden, *args, **kwargs)
    return list(by_input.values())


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


def _head(model: Any) -> Linear:
    output = model.get_output_embeddings()
    name = _name_of(model, output)
    rows, inputs = output.weight.shape
    return Linear(name, rows, inputs, row_parallel=False, reads=name)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(wanted)]
