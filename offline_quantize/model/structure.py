"""Which linears of a model are quantised, found by structure: ``nn.Linear`` inside the repeated decoder layers.

The model is built without weights. One decoder layer at a time is run on meta tensors, and linears that receive the very
same tensor object form an input group: they share channel scales and rotation, as vLLM's fused layers need. So do the experts of a
layer, which vLLM holds in one tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from offline_quantize.errors import QuantizeError
from offline_quantize.model.experts import Experts, unfuse_experts
from qamw_kernels.format.config import role_of

MIN_LINEAR_SHARE = 0.9  # of a decoder layer's parameters: below it, the weights that matter are not nn.Linear


@dataclass(frozen=True)
class Linear:
    """One ``nn.Linear``: its module name and its weight's shape [num_rows, num_inputs].

    Attributes:
        row_parallel: True where vLLM may cut the inputs between tensor-parallel ranks.
        reads: name of the first linear that reads the same input: their Hessian is one. All experts of a layer read the same input, of
            which each sees some tokens.
    """

    name: str
    num_rows: int
    num_inputs: int
    row_parallel: bool
    reads: str

    @property
    def routed(self) -> bool:
        """Whether it belongs to an expert, which does not see every token."""
        return role_of(self.name) != self.name

    @property
    def counted(self) -> bool:
        """Whether its input adds to the Hessian: once for every token, and for every expert that the token is sent to."""
        return role_of(self.name) == role_of(self.reads)


@dataclass(frozen=True)
class Structure:
    """The decoder layers of a model.

    Attributes:
        layers_name: module name of the list of decoder layers.
        layers: for every layer, its input groups; for every group, its linears.
        num_heads, num_kv_heads: attention heads, None where config.json does not say; vLLM cuts between heads.
        kv_rows: rows of a key projection, which vLLM replicates rather than cuts when ranks outnumber its heads.
        parameter_names: every tensor that a checkpoint must have.
        head: the linear that makes logits. head_source: the tensor with its weight, which may be that of the embeddings.
    """

    layers_name: str
    layers: tuple[tuple[tuple[Linear, ...], ...], ...]
    num_heads: int | None
    num_kv_heads: int | None
    kv_rows: int | None
    parameter_names: tuple[str, ...]
    head: Linear
    head_source: str

    def linears(self) -> Iterator[Linear]:
        for groups in self.layers:
            for group in groups:
                yield from group


def build_empty_model(directory: Path) -> Any:
    """The transformers model of config.json with parameters on the meta device and real buffers; no remote code."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            unfuse_experts(model)
    except Exception as error:  # whatever the code of an architecture makes of a bad config.json
        raise QuantizeError(f"{directory}: unsupported architecture: {type(error).__name__}: {error}") from None
    return model.eval()


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and module of the repeated decoder layers: the largest ``nn.ModuleList``."""
    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise QuantizeError(f"unsupported architecture {type(model).__name__}: it has no repeated layers")
    return max(lists, key=lambda item: size(item[1]))


class _AllLayersCalled(Exception):
    pass


def record_layer_calls(model: Any, layers: nn.ModuleList, input_ids: torch.Tensor) -> list[tuple[torch.Tensor, tuple, dict]]:
    """(hidden states, args, kwargs) with which the model calls each decoder layer on ``input_ids`` [batch, T].

    The layers pass their input through, so only the first hidden states are real; args and kwargs (masks, rotary
    embeddings, which may differ by layer) are what the layers need. Needs no decoder weights.
    """
    calls: list[tuple[torch.Tensor, tuple, dict]] = []
    order: list[int] = []

    def recorder(index: int) -> Callable[..., torch.Tensor]:
        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            order.append(index)
            calls.append((hidden, args, kwargs))
            if len(calls) == len(layers):
                raise _AllLayersCalled
            return hidden

        return record

    for i, layer in enumerate(layers):
        layer.forward = recorder(i)
    try:
        with torch.no_grad():
            model.base_model(input_ids=input_ids, use_cache=False)
    except _AllLayersCalled:
        pass
    except Exception as error:  # whatever the model's own code raises
        raise QuantizeError(f"unsupported architecture {type(model).__name__}: calling it fails: {error}") from error
    finally:
        for layer in layers:
            del layer.forward
    if order != list(range(len(layers))):
        raise QuantizeError(f"unsupported architecture {type(model).__name__}: its {len(layers)} decoder layers were called as {order}")
    return calls


@contextmanager
def on_linear_inputs(layer: nn.Module, callback: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While active, call ``callback(name inside the layer, input)`` whenever an ``nn.Linear`` of the layer runs."""
    def hook_for(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: callback(name, args[0])

    handles = [m.register_forward_pre_hook(hook_for(name)) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def set_parameters(module: nn.Module, make: Callable[[str, torch.Tensor], torch.Tensor], skip: str = "", buffers: bool = False) -> None:
    """Replace every parameter (and buffer) of ``module`` by ``make(name, old)``, but for those below the submodule ``skip``."""
    for prefix, submodule in module.named_modules():
        if skip and (prefix + ".").startswith(skip + "."):
            continue
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            setattr(submodule, name, nn.Parameter(make(full, parameter), requires_grad=False))
        for name, buffer in list(submodule.named_buffers(recurse=False)) if buffers else ():
            setattr(submodule, name, make(f"{prefix}.{name}" if prefix else name, buffer))


def _input_groups(layer: nn.Module, call: tuple[torch.Tensor, tuple, dict]) -> list[list[str]]:
    """Names inside the layer of the linears that receive the same tensor, in the order in which they run."""
    by_input: dict[int, list[str]] = {}
    alive = []  # keeps ids unique while the layer runs

    def note(name: str, x: torch.Tensor) -> None:
        alive.append(x)
        by_input.setdefault(id(x), []).append(name)

    hidden, args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), call)
    with on_linear_inputs(layer, note), torch.no_grad():
        layer(hidden, *args, **kwargs)
    return list(by_input.values())


def find_structure(directory: Path) -> Structure:
    """Analyse the model of a checkpoint directory; reads config.json only.

    Raises:
        QuantizeError: the architecture is unknown, or most of its weights are not ``nn.Linear`` in repeated layers.
    """
    model = build_empty_model(directory)
    layers_name, layers = decoder_layers(model)
    # Weights outside the layers are needed to call the model: zeros are enough, one zero for all of a weight.
    set_parameters(model, lambda name, p: torch.zeros((), dtype=p.dtype).expand(p.shape), skip=layers_name)
    calls = record_layer_calls(model, layers, torch.zeros(1, 4, dtype=torch.long))
    layers.to("meta")

    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    # By the last part of the name: plans leave out whole blocks (shared experts, the attention of some models).
    row_parallel = {pattern.rpartition(".")[2] for pattern, style in plan.items() if "rowwise" in style} | {"o_proj", "down_proj"}

    found = []
    for i, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        blocks = {name.rpartition(".")[0] for name, m in layer.named_modules() if isinstance(m, Experts)}
        modules = {name: m for name, m in layer.named_modules()
                   if isinstance(m, nn.Linear) and name.rpartition(".")[0] not in blocks}  # beside experts: routers and gates
        total, in_linears = sum(p.numel() for p in layer.parameters()), sum(m.weight.numel() for m in modules.values())
        if in_linears < MIN_LINEAR_SHARE * total:
            others = sorted({n.rpartition(".")[0] for n, p in layer.named_parameters() if p.ndim > 1} - set(modules))
            raise QuantizeError(f"unsupported architecture {type(model).__name__}: nn.Linear holds only {in_linears / total:.0%} of the "
                                f"weights of {layers_name}.{i}; the rest is in {others}")
        try:
            groups = [[name for name in group if name in modules] for group in _input_groups(layer, call)]
        except Exception as error:  # whatever a layer's own code raises on meta tensors
            raise QuantizeError(f"unsupported architecture {type(model).__name__}: {layers_name}.{i} cannot be traced: {error}") from error
        called = {name for group in groups for name in group}
        groups += [[name] for name in modules if name not in called]
        by_role: dict[str, list[Linear]] = {}  # input groups, but those of experts' inner activations are one
        for group in filter(None, groups):
            for name in dict.fromkeys(group):
                full, first = f"{layers_name}.{i}.{name}", f"{layers_name}.{i}.{group[0]}"
                inner = len(group) == 1 and role_of(full) != full
                cut = inner or not plan or name.rpartition(".")[2] in row_parallel
                rows, inputs = modules[name].weight.shape
                by_role.setdefault(role_of(first), []).append(Linear(full, rows, inputs, cut, first))
        found.append(tuple(map(tuple, by_role.values())))
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    try:
        head_dim = getattr(config, "head_dim", None) or (config.hidden_size // num_heads if num_heads else None)
    except Exception:  # transformers has an error of its own for models whose layers differ in it (Gemma 4)
        head_dim = None
    names = {id(module): name for name, module in model.named_modules()}
    output, tied = model.get_output_embeddings(), bool(config.tie_word_embeddings)
    head = Linear(names[id(output)], len(output.weight), output.weight.shape[1], False, names[id(output)])
    return Structure(layers_name, tuple(found), num_heads, num_kv_heads, num_kv_heads * head_dim if num_kv_heads and head_dim else None,
                     tuple(name for name, _ in model.named_parameters() if not (tied and name == f"{head.name}.weight")),
                     head, f"{names[id(model.get_input_embeddings())] if tied else head.name}.weight")
