"""Which parts of a model are quantized, and whether their tensors allow that."""

import fnmatch
from collections.abc import Iterable, Sequence

from offline_quantize.errors import Option, QuantizeError
from offline_quantize.files import CONFIG
from offline_quantize.model.checkpoint import Checkpoint, TensorInfo
from offline_quantize.model.structure import DecoderLayer, InputGroup, Linear, Structure
from offline_quantize.model.tied import any_differ
from offline_quantize.planning.served import NO_HEAD, name_in_vllm, served
from qamw_kernels.codec.encode import check_source_dtype
from qamw_kernels.errors import first_few
from qamw_kernels.format.packing import UNIT_INPUTS


def check_complete(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse a checkpoint that has too few tensors, too many, or of other shapes.

    Raises:
        QuantizeError: names the tensor.
    """
    for name in structure.expected:
        if name not in checkpoint.tensors:
            unknown = sorted(set(checkpoint.tensors) - structure.expected.keys())[:3]
            hint = f"; it does not have these tensors: {', '.join(unknown)}" if unknown else ""
            raise QuantizeError(
                f"{checkpoint.directory}: no tensor {name}, "
                f"which the architecture of config.json has{hint}"
            )
    for name, shape in structure.expected.items():
        _check_shape(checkpoint.tensors[name], shape)
    if structure.unwanted:
        raise QuantizeError(
            f"{checkpoint.directory}: the architecture of config.json does not use the tensors "
            f"{', '.join(structure.unwanted[:3])}: vLLM would not load them"
        )
    for name, tensor in sorted(structure.tied.items()):
        raise QuantizeError(
            f"{checkpoint.directory}: {name} is tied to {tensor} and has no tensor of its own, "
            "as vLLM needs it: save the model with both, and with tie_word_embeddings false"
        )


# Of the weights of all matrices in the decoder layers.
MAX_KEPT_SHARE = 0.1
_SHOWN = 8  # reasons in a message


def kept_matrices(structure: Structure) -> list[str]:
    """Lines that say which matrices of the decoder layers stay as they are, and why."""
    lines = {f"{pattern_of(name)}: {kept.reason}": None for name, kept in structure.kept.items()}
    return list(lines)


def pattern_of(name: str) -> str:
    """The name of a tensor or module with ``*`` for every number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def check_share(structure: Structure, allow_partial: bool) -> None:
    """Refuse a model if too many of its weights, or all, would stay as they are.

    Raises:
        QuantizeError: names what would stay, and why.
    """
    listed = first_few(kept_matrices(structure), _SHOWN, "\n  ")
    if not any(layer.groups for layer in structure.layers):
        raise QuantizeError(
            f"{structure.architecture}: no matrix of the decoder can be quantized:\n  {listed}"
        )
    if structure.kept_share <= MAX_KEPT_SHARE or allow_partial:
        return
    raise QuantizeError(
        f"{structure.architecture}: {structure.kept_share:.0%} of the decoder's weights cannot be "
        f"quantized:\n  {listed}\nthey would stay as they are with ",
        Option("allow_partial", True),
    )


def select_layers(structure: Structure, ignore: Sequence[str]) -> tuple[DecoderLayer, ...]:
    """All decoder layers, with the input groups that are quantized.

    Args:
        ignore: glob patterns of linears that stay as they are.
    Raises:
        QuantizeError: a pattern matches nothing, or only some of the linears that vLLM fuses; or
            nothing is left.
    """
    _check_patterns(structure, ignore)
    layers = tuple(_select_groups(layer, ignore) for layer in structure.layers)
    if not any(layer.groups for layer in layers):
        raise QuantizeError(Option("ignore", list(ignore)), " leaves nothing to quantize")
    return layers


def select_head(structure: Structure, architecture: str, wanted: bool) -> Linear | None:
    """The head, if it is to be quantized.

    Args:
        architecture: of :func:`vllm_architecture`.
    Raises:
        QuantizeError: vLLM could not serve it.
    """
    if not wanted:
        return None
    if structure.head is None:
        raise QuantizeError(
            Option("quantize_lm_head", True), f": {structure.architecture} makes no logits"
        )
    if fault := served(architecture).head_fault:
        raise QuantizeError(
            Option("quantize_lm_head", True),
            f": vLLM cannot serve a quantized head of {architecture}, {fault}",
        )
    return structure.head


def unquantized_matrices(
    checkpoint: Checkpoint, linears: Iterable[Linear], head: Linear | None
) -> tuple[str, ...]:
    """Names of the modules whose weight stays a plain matrix.

    Not only of those that are ``nn.Linear`` in transformers: vLLM builds routers and heads as
    linear layers of its own.

    Args:
        linears: what is quantized in the decoder layers.
        head: the head, if it is quantized.
    """
    quantized = {linear.name for linear in linears}
    if head:
        quantized.add(head.name)
    modules = [
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    ]
    kept = sorted(set(modules) - quantized)
    if "lm_head" not in kept and not head:
        kept.append("lm_head")  # its weight is that of the embeddings
    return tuple(kept)


def check_tensors(
    checkpoint: Checkpoint,
    structure: Structure,
    architecture: str,
    linears: Sequence[Linear],
    head: Linear | None,
) -> None:
    """Check the headers of every tensor that is quantized, and that vLLM uses the model's head.

    Args:
        architecture: of :func:`vllm_architecture`.
    Raises:
        QuantizeError: one has a shape or dtype that cannot be quantized, or the head is not used.
    """
    stacked = {part: stack for stack in structure.stacks.values() for part in stack.slices}
    for linear in linears:
        if stack := stacked.get(linear.weight_name):
            _check_weight(checkpoint, stack.name, stack.shape)
        else:
            _check_weight(checkpoint, linear.weight_name, (linear.num_rows, linear.num_inputs))
    if head:
        _check_weight(checkpoint, structure.head_source, (head.num_rows, head.num_inputs))
        if head.num_inputs % UNIT_INPUTS:
            raise QuantizeError(
                Option("quantize_lm_head", True),
                f": {structure.head_source} has {head.num_inputs} inputs, "
                f"not a multiple of {UNIT_INPUTS}",
            )
    _check_unserved_head(checkpoint, structure, architecture)


def vllm_architecture(checkpoint: Checkpoint, structure: Structure) -> str:
    """The architecture name under which vLLM looks up its model class.

    Raises:
        QuantizeError: config.json names one that neither vLLM nor transformers knows.
    """
    listed = checkpoint.config.get("architectures")
    names = list(map(str, listed)) if isinstance(listed, list) else []
    names = names or [structure.architecture]
    if known := name_in_vllm(names):
        return known
    # transformers goes by model_type; it spells MPTForCausalLM in another way.
    if names[0].lower() != structure.architecture.lower():
        raise QuantizeError(
            f"{checkpoint.directory / CONFIG}: unsupported architecture {names[0]}: expected one "
            f"that vLLM or transformers knows, such as {structure.architecture}"
        )
    return names[0]


def _check_unserved_head(checkpoint: Checkpoint, structure: Structure, architecture: str) -> None:
    """Refuse a head that transformers uses, but vLLM does not."""
    embeddings, head = structure.embeddings, structure.head_source
    no_head = served(architecture).head_fault == NO_HEAD
    if structure.head is None or head == embeddings or not no_head:
        return
    if any_differ(checkpoint, [(embeddings, head)]):
        raise QuantizeError(
            f"{checkpoint.directory}: {head} differs from {embeddings}; transformers uses it, but "
            f"not vLLM's {architecture}, {NO_HEAD}"
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(structure: Structure, ignore: Sequence[str]) -> None:
    names = [linear.name for linear in structure.linears()]
    kept = [name.removesuffix(".weight") for name in structure.kept]  # so they stay anyway
    for pattern in ignore:
        if not any(_matches(name, [pattern]) for name in (*names, *kept)):
            raise QuantizeError(
                Option("ignore", [pattern]),
                f" matches no linear layer of the decoder; names look like {names[0]} "
                "(everything outside the decoder layers, such as lm_head, is left alone unless "
                "asked for)",
            )


def _select_groups(layer: DecoderLayer, ignore: Sequence[str]) -> DecoderLayer:
    kept = tuple(group for group in layer.groups if not _is_ignored(group, ignore))
    experts = [group for group in layer.groups if group.routed]
    if 0 < sum(group in kept for group in experts) < len(experts):
        block = experts[0].name.rpartition(".experts.")[0]
        raise QuantizeError(
            Option("ignore", list(ignore)),
            f" leaves out some matrices of the experts of {block}, but not others: "
            "they are served together, ignore all or none of them",
        )
    return layer.with_groups(kept)


def _is_ignored(group: InputGroup, ignore: Sequence[str]) -> bool:
    left_out = [linear.name for linear in group if _matches(linear.name, ignore)]
    others = [linear.name for linear in group if linear.name not in left_out]
    if left_out and others:
        raise QuantizeError(
            Option("ignore", list(ignore)),
            f" leaves out {left_out} but not {others}: "
            "layers that read the same input are fused when served, ignore all or none of them",
        )
    return bool(left_out)


def _check_weight(checkpoint: Checkpoint, source: str, shape: tuple[int, ...]) -> None:
    """Check the tensor ``source``, which has weights that are quantized."""
    info = checkpoint.tensors[source]
    _check_shape(info, shape)
    check_source_dtype(f"{info.file}: {info.name}", info.dtype)


def _check_shape(info: TensorInfo, expected: tuple[int, ...]) -> None:
    if info.shape != expected:
        raise QuantizeError(
            f"{info.file}: {info.name} has shape {list(info.shape)}, "
            f"expected {list(expected)} by config.json"
        )
