"""Which layers of a plain model are quantized while it is loaded; chosen when all are made.

They are found by their structure, as ``qamw quantize`` finds them, and not by their names: all
linears of the repeated layers. These are the ``nn.ModuleList`` with the most weights; in a model
that also takes images or sound, that of its language model. Left out are

- routers, and gates beside experts: linears that vLLM replicates on every rank, in a block that
  holds experts;
- linears that multiply group by group, in code of their model class (DeepSeek-V4);
- linears with a number of inputs that is not a multiple of 64, which the format cannot pack.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear
from vllm.model_executor.offloader import NoopOffloader, get_offloader

from qamw_kernels.errors import FormatError, first_few
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_vllm.online.experts import QamwOnlineMoEMethod
from qamw_vllm.online.linear import QamwOnlineLinearMethod

logger = init_logger(f"vllm.{__name__}")

MIN_SHARE = 0.5
"""A model is refused if a smaller share of its repeated layers' linear weights is quantized."""

_NAMES_SHOWN = 6


@dataclass(frozen=True)
class _Layer:
    name: str
    module: Any
    num_weights: int
    covered: bool


def check_not_offloaded() -> None:
    """Check that vLLM offloads no weights: it would do so while these layers have none yet.

    Raises:
        FormatError: vLLM offloads weights to the CPU.
    """
    offloader = get_offloader()
    if not isinstance(offloader, NoopOffloader):
        raise FormatError(
            f"{type(offloader).__name__}: weights that are quantized while loading cannot be "
            "offloaded to the CPU; run qamw quantize first: its checkpoints can be offloaded"
        )


def choose_layers(model: nn.Module, is_draft: bool = False) -> None:
    """Start to quantize the chosen layers of a model, and make the others plain layers of vLLM.

    Args:
        model: as vLLM has made it; on this rank.
        is_draft: whether it is a draft model, for which any share is accepted.
    Raises:
        FormatError: nothing, or less than half of the linear weights, would be quantized.
    """
    layers = list(_layers_of(model))
    _check_share(model, layers, is_draft)
    covered = {layer.name for layer in layers if layer.covered}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QamwOnlineLinearMethod):
            if name in covered:
                method.start(module)
            else:
                method.leave(module)


def _check_share(model: nn.Module, layers: list[_Layer], is_draft: bool) -> None:
    total = sum(layer.num_weights for layer in layers)
    share = sum(layer.num_weights for layer in layers if layer.covered) / max(total, 1)
    left = sorted(
        (layer for layer in layers if not layer.covered), key=lambda layer: -layer.num_weights
    )
    names = first_few([layer.name for layer in left], _NAMES_SHOWN)
    if share < MIN_SHARE and not is_draft and (total or not _has_missing_layers(model)):
        reason = (
            f"vLLM builds these without a quantization config, or qamw cannot pack them: {names}"
            if layers
            else "it has no repeated layers with linear layers"
        )
        raise FormatError(
            f"{type(model).__name__}: only {share:.0%} of its linear weights would be quantized "
            f"while loading, at least {MIN_SHARE:.0%} are expected; {reason}. Serve it without "
            "--quantization qamw, or make a checkpoint of it with 'qamw quantize'"
        )
    if left:
        logger.info(
            "QAM-W: %.1f %% of the linear weights of the layers stay as they are: %s",
            100 * (1 - share),
            names,
        )


def is_router(layer: nn.Module) -> bool:
    """Whether vLLM's class of a layer says that it chooses experts."""
    return type(layer).__name__ == "GateLinear"  # which older releases do not have


def can_be_packed(layer: Any) -> bool:
    """Whether the format can store the matrices of a linear of vLLM, or of its experts."""
    widths = _widths_of_experts(layer) if isinstance(layer, RoutedExperts) else (layer.input_size,)
    return all(width % UNIT_INPUTS == 0 for width in widths)


def _layers_of(model: nn.Module) -> Iterator[_Layer]:
    """The linears and experts of the repeated layers, quantized or not."""
    repeated = _repeated_layers(_language_model(model))
    if repeated is None:
        return
    names = {id(module): name for name, module in model.named_modules()}
    gates = _gates(repeated)
    for module in repeated.modules():
        name, method = names[id(module)], getattr(module, "quant_method", None)
        if isinstance(module, RoutedExperts):
            num_weights = _num_weights_of_experts(module)
            yield _Layer(name, module, num_weights, isinstance(method, QamwOnlineMoEMethod))
        elif isinstance(module, LinearBase):
            if id(module) not in gates:
                num_weights = module.input_size * module.output_size
                whole = not getattr(module, "is_bmm", False)
                covered = whole and isinstance(method, QamwOnlineLinearMethod)
                yield _Layer(name, module, num_weights, covered)
        elif isinstance(module, nn.Linear) and id(module) not in gates:
            yield _Layer(name, module, module.weight.numel(), False)


def _language_model(model: nn.Module) -> nn.Module:
    """The part of a model that reads text; the model itself where it has no other."""
    if not getattr(model, "supports_multimodal", False):
        return model
    language_model = model.get_language_model()  # type: ignore[operator]  # of vLLM's interface
    return language_model if isinstance(language_model, nn.Module) else model


def _repeated_layers(model: nn.Module) -> nn.ModuleList | None:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=_num_linear_weights, default=None)


def _num_linear_weights(module: nn.Module) -> int:
    total = 0
    for part in module.modules():
        if isinstance(part, RoutedExperts):
            total += _num_weights_of_experts(part)
        elif isinstance(part, LinearBase):
            total += part.input_size * part.output_size
        elif isinstance(part, nn.Linear):
            total += part.weight.numel()
    return total


def _num_weights_of_experts(experts: Any) -> int:
    hidden, inner = _widths_of_experts(experts)
    matrices = 3 if experts.moe_config.is_act_and_mul else 2
    return matrices * hidden * inner * int(experts.global_num_experts)


def _widths_of_experts(experts: Any) -> tuple[int, int]:
    """Inputs of gate and up, and of down, of an expert on all ranks together."""
    config = experts.moe_config
    inner = config.intermediate_size_per_partition * config.moe_parallel_config.tp_size
    return int(config.hidden_dim), int(inner)


def _gates(repeated: nn.ModuleList) -> set[int]:
    """Ids of the routers and gates: replicated linears in a block that holds experts itself."""
    blocks = []
    for layer in repeated:
        modules = dict(layer.named_modules())
        for name, module in modules.items():
            if isinstance(module, RoutedExperts):
                runner = name.rpartition(".")[0]  # vLLM's, which holds the experts
                block = runner.rpartition(".")[0]
                if block:  # else the experts lie beside everything else of the layer
                    blocks.append(modules[block])
    routers = (module for module in repeated.modules() if is_router(module))
    inside = (
        module
        for block in blocks
        for module in block.modules()
        if isinstance(module, ReplicatedLinear | nn.Linear)
    )
    return {id(module) for module in (*routers, *inside)}


def _has_missing_layers(model: nn.Module) -> bool:
    """Whether other ranks of a pipeline have the layers."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return any(isinstance(module, PPMissingLayer) for module in model.modules())
