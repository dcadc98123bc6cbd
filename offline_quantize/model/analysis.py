"""The linears of a model that can be quantized: every matrix of its decoder layers' ``nn.Linear``.

The model is built without weights. One decoder layer at a time is run on meta tensors. Linears that
receive the very same tensor object form an input group: they share input scales and rotation, as
vLLM's fused layers need. So do the experts of a layer, which vLLM holds in one tensor.

Linears have the names and shapes of the checkpoint's matrices: one that is split while it is loaded
is one linear, and several that are merged are several.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from offline_quantize.errors import explained
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import (
    build_empty_model,
    decoder_layers,
    name_of,
    set_parameters,
)
from offline_quantize.model.experts import Experts
from offline_quantize.model.structure import DecoderLayer, InputGroup, Kept, Linear, Structure
from offline_quantize.model.tensor_map import TensorMap
from offline_quantize.model.tracing import (
    LayerCall,
    Traced,
    head_input,
    record_layer_calls,
    trace_layer,
)
from offline_quantize.model.unwanted import unwanted
from qamw_kernels.format.config import role_of
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.format.sharding import attention_heads, differs, shared_setting
from qamw_kernels.format.stacks import Stack

TRACED_TOKENS = 4


def find_structure(checkpoint: Checkpoint) -> Structure:
    """Analyze the model of a plain or QAM-W checkpoint; no tensor is read.

    Raises:
        QuantizeError: the architecture is not known, or cannot be traced.
    """
    model, tensor_map = build_empty_model(checkpoint)
    layers_name, modules = decoder_layers(model)
    calls = _layer_calls(model, layers_name, modules)
    row_parallel = _row_parallel_names(model.config.get_text_config())
    unsupported = f"unsupported architecture {type(model).__name__}"
    layers: list[DecoderLayer] = []
    kept: dict[str, Kept] = {}
    for index, (module, call) in enumerate(zip(modules, calls, strict=True)):
        name = f"{layers_name}.{index}"
        with explained(f"{unsupported}: {name} cannot be traced"):
            traced = trace_layer(module, call)
        groups = _input_groups(name, module, traced, tensor_map, row_parallel)
        tensors = tuple(tensor_map.tensors_of(f"{name}."))
        stacks = _stacks_of(groups, tensors, tensor_map)
        layers.append(DecoderLayer(name, index, groups, tensors, stacks))
        kept |= _kept(layers[-1], module, tensor_map)
    head, output = _head(model, tensor_map), model.get_output_embeddings()
    embeddings = f"{name_of(model, model.get_input_embeddings())}.weight"
    shared = tensor_map.shared()
    needed = {name for name in shared if name.startswith(f"{layers_name}.")}
    if output is not None and shared.get(embeddings) == f"{name_of(model, output)}.weight":
        needed.add(embeddings)
    num_heads, num_kv_heads, kv_rows = _attention_heads(model.config.get_text_config())
    head_source = ""
    if output is not None:
        head_source = tensor_map.tensor_of(f"{name_of(model, output)}.weight")
    return Structure(
        layers_name=layers_name,
        layers=tuple(layers),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        kv_rows=kv_rows,
        head=head,
        head_source=head_source,
        embeddings=tensor_map.tensor_of(embeddings),
        tied={name: tensor_map.tensor_of(name) for name in needed},
        stored_twice=tensor_map.stored_twice(),
        architecture=type(model).__name__,
        context=_context(model.config.get_text_config()),
        state_width=calls[0].hidden.numel() // TRACED_TOKENS,
        expected=tensor_map.expected,
        stacks=tensor_map.stacks,
        unwanted=unwanted(model, tensor_map),
        kept=kept,
    )


def _layer_calls(model: Any, layers_name: str, layers: nn.ModuleList) -> list[LayerCall]:
    """How the model calls its decoder layers, which are on the meta device, with a few tokens.

    Raises:
        QuantizeError: the model cannot be called with decoder layers that pass their input
            through, as in calibration.
    """
    # Weights outside the layers are needed to call the model: one zero stands for all of a weight.
    set_parameters(
        model, lambda name, p: torch.zeros((), dtype=p.dtype).expand(p.shape), skip=layers_name
    )
    calls = record_layer_calls(model, layers, torch.zeros(1, TRACED_TOKENS, dtype=torch.long))
    if model.get_output_embeddings() is not None:
        head_input(model, layers, calls, calls[-1].hidden)
    layers.to("meta")
    return calls


def _row_parallel_names(config: Any) -> set[str] | None:
    """Last parts of the names of linears whose inputs may be cut.

    None where they are not known: then the inputs of any linear may be cut, but for those that read
    the layer's first input, which no linear made.
    """
    plan = type(config).base_model_tp_plan  # config.json may have anything there
    if not plan:
        return None
    # Not whole names: plans leave out whole blocks (shared experts, the attention of some models).
    names = {pattern.rpartition(".")[2] for pattern, style in plan.items() if "rowwise" in style}
    return names | {"o_proj", "down_proj"}


def _input_groups(
    layer_name: str,
    layer: nn.Module,
    traced: Traced,
    tensor_map: TensorMap,
    row_parallel: set[str] | None,
) -> tuple[InputGroup, ...]:
    """The input groups of one decoder layer."""
    blocks = _blocks_with_experts(layer)
    modules = {
        name.removesuffix(".weight"): None
        for name, parameter in layer.named_parameters()
        if parameter.ndim > 1 and not _reason_to_keep(layer, name, blocks)
    }
    whole = {name for names in traced.inputs[:1] for name in names}  # no linear made their input
    called: set[str] = set()
    groups: list[list[str]] = []
    for inputs in traced.inputs:  # one that runs several times belongs to its first run
        groups.append([name for name in inputs if name in modules and name not in called])
        called.update(inputs)
    groups += [[name] for name in modules if name not in called]

    by_role: dict[str, list[Linear]] = {}  # one for the same matrices of all experts
    for names in groups:
        matrices = _matrices(layer_name, dict.fromkeys(names), tensor_map)
        for name, (shape, parts) in matrices.items():
            reads = next(iter(matrices))
            inner = len(matrices) == 1 and role_of(name) != name  # reads what its expert computed
            last = parts[0].rpartition(".")[2]
            may_be_cut = whole.isdisjoint(names) if row_parallel is None else last in row_parallel
            cut = inner or may_be_cut
            linear = Linear(name, *shape, cut, reads, tuple(parts))
            by_role.setdefault(role_of(reads), []).append(linear)
    return tuple(InputGroup(tuple(linears)) for linears in by_role.values())


def _stacks_of(
    groups: Iterable[InputGroup], tensors: Iterable[str], tensor_map: TensorMap
) -> tuple[Stack, ...]:
    """Of the tensors of a layer, those that hold the weights of several linears."""
    weights = {linear.weight_name for group in groups for linear in group}
    stacks = (tensor_map.stacks[name] for name in tensors if name in tensor_map.stacks)
    return tuple(stack for stack in stacks if weights >= stack.slices.keys())


def _kept(layer: DecoderLayer, module: nn.Module, tensor_map: TensorMap) -> dict[str, Kept]:
    """Matrices of a decoder layer that stay as they are, by the name of their tensor."""
    read = {name for linear in layer.linears() for name in linear.modules}
    blocks = _blocks_with_experts(module)
    kept: dict[str, Kept] = {}
    for name, parameter in module.named_parameters():
        full = f"{layer.name}.{name}"
        if parameter.ndim > 1 and full.removesuffix(".weight") not in read:
            reason = _reason_to_keep(module, name, blocks) or "transposed or cut while it is loaded"
            tensor = tensor_map.tensor_of(full)
            others = kept[tensor].num_weights if tensor in kept else 0
            kept[tensor] = Kept(reason, parameter.numel() + others)
    return kept


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


def _blocks_with_experts(layer: nn.Module) -> set[str]:
    """Names inside a layer of the modules that hold experts."""
    return {
        name.rpartition(".")[0]
        for name, module in layer.named_modules()
        if isinstance(module, Experts)
    }


def _reason_to_keep(layer: nn.Module, name: str, blocks: Collection[str]) -> str:
    """Why a matrix of a layer stays as it is; empty if it need not.

    In a block with experts, a linear that is alone in its module is a router or a gate: other
    modules that read the block's input, such as shared experts, have several.

    Args:
        name: of the parameter, inside the layer.
        blocks: of :func:`_blocks_with_experts`.
    """
    module_name, _, attribute = name.rpartition(".")
    module = layer.get_submodule(module_name)
    if attribute != "weight" or not _multiplies(module):
        return f"no nn.Linear, but {type(module).__name__}"
    assert isinstance(module, nn.Linear)
    if module.in_features % UNIT_INPUTS:
        return f"{module.in_features} inputs, not a multiple of {UNIT_INPUTS}"
    parent_name = module_name.rpartition(".")[0]
    if parent_name in blocks:
        return "a router or a gate"
    in_block = parent_name.rpartition(".")[0] in blocks
    siblings = layer.get_submodule(parent_name).children()
    if in_block and sum(isinstance(child, nn.Linear) for child in siblings) == 1:
        return "a router or a gate"
    return ""


def _multiplies(module: nn.Module) -> bool:
    """Whether a module on the meta device is a linear that multiplies with all of its weight.

    Some classes derived from ``nn.Linear`` do otherwise (DeepSeek-V4: a block for each group).
    """
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    try:
        output = module(module.weight.new_empty(1, module.in_features))
    except Exception:  # of whatever kind the model's own code raises
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def _attention_heads(config: Any) -> tuple[int | None, int | None, int | None]:
    """``num_heads``, ``num_kv_heads`` and ``kv_rows`` of :class:`Structure`."""
    num_heads, num_kv_heads = attention_heads(config)
    head_dim = shared_setting(config, "head_dim")
    hidden_size = shared_setting(config, "hidden_size")
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    if any(differs(config, name) for name in names):
        return num_heads, num_kv_heads, None
    if not head_dim and num_heads and hidden_size:
        head_dim = hidden_size // num_heads
    return num_heads, num_kv_heads, num_kv_heads * head_dim if num_kv_heads and head_dim else None


def _context(config: Any) -> int | None:
    """``context`` of :class:`Structure`; what is no number of tokens is left to transformers."""
    context = shared_setting(config, "max_position_embeddings")
    return context if isinstance(context, int) and context > 1 else None


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
