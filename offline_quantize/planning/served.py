"""What vLLM can serve of a quantized model, read from the sources of its model classes.

A quantized layer needs ``quant_config`` where vLLM's model class builds it, and a quantized head
also ``prefix=<its name>``. Where vLLM is installed, its sources are read; elsewhere, the list that
``tools/served.py`` made of them is used.
"""

import ast
import dataclasses
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from offline_quantize.model.structure import InputGroup, Kept, Linear, Structure
from offline_quantize.planning.vllm_sources import (
    Definition,
    Sources,
    argument,
    calls,
    installed_vllm,
    target_of,
)

SERVED = Path(__file__).with_name("served.json")
NO_HEAD = "which has no head and makes logits with the embeddings"
NO_CONFIG = "which builds its head without a quantization config"
NO_NAME = "which does not tell the quantization config its head's name"
_WRITES = "ForCausalLM", "LMHeadModel"
_READS = (
    *("ForSequenceClassification", "ForTokenClassification"),
    *("ForRewardModel", "ForRewardModeling", "RewardModel", "EmbeddingModel", "Model"),
)
"""Ends of the names of classes with and without a language head."""


@dataclass(frozen=True)
class Served:
    """How vLLM's model class builds an architecture's matrices; all empty if it has no class.

    Attributes:
        head_fault: why a quantized head cannot be served: NO_HEAD, NO_CONFIG, NO_NAME or None.
        plain: last parts of the names of linears that are never built with a quantization config
            -> the class and the attribute that they are loaded into.
        cut: last parts of the names of linears whose inputs are cut between ranks.
    """

    head_fault: str | None = None
    plain: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cut: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The values for JSON; those that are empty are left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


@functools.cache
def served(architecture: str, sources: Path | None = None) -> Served:
    """What vLLM serves of an architecture.

    Args:
        sources: vLLM's package directory; None for that of the installed vLLM, if there is one, or
            else the list that was made of it.
    """
    sources = sources or installed_vllm()
    if sources is not None:
        return _read(Sources(sources), architecture)
    values = json.loads(SERVED.read_text()).get(architecture, {})
    return Served(**values | {"cut": tuple(values.get("cut", ()))})


def name_in_vllm(architectures: Iterable[str], sources: Path | None = None) -> str | None:
    """The name of vLLM's class for a model: the first of several names that vLLM knows.

    vLLM makes a model without a language head, such as a classifier, from the class with one, so
    the name of that class counts too.

    Args:
        architectures: as config.json lists them.
        sources: see :func:`served`.
    Returns:
        None where it knows none of them.
    """
    sources = sources or installed_vllm()
    known: Collection[str] = (
        Sources(sources).registered if sources else json.loads(SERVED.read_text())
    )
    names = (name for listed in architectures for name in (listed, *_writing(listed)))
    return next((name for name in names if name in known), None)


def _writing(architecture: str) -> Iterator[str]:
    for end in _READS:
        if architecture.endswith(end):
            yield from (architecture.removesuffix(end) + other for other in _WRITES)


def read_all(sources: Path, multimodal: Iterable[str]) -> dict[str, Served]:
    """Architectures -> what vLLM serves of them.

    Args:
        sources: vLLM's package directory.
        multimodal: the architectures to consider besides those that are for text only.
    """
    read = Sources(sources)
    return {name: _read(read, name) for name in sorted({*read.text_models, *multimodal})}


def as_served(structure: Structure, architecture: str) -> Structure:
    """The structure of a model, adapted to vLLM's model class.

    Linears that cannot be served quantized are kept as they are, and those whose inputs vLLM cuts
    are marked as row-parallel.

    Args:
        architecture: the name in vLLM's registry.
    """
    known = served(architecture)
    kept = {
        linear.weight_name: Kept(
            f"vLLM builds {place} without a quantization config", linear.num_weights
        )
        for linear in structure.linears()
        if (place := _plain_place(linear, known))
    }
    layers = tuple(
        layer.with_groups(filter(None, (_as_served(group, known) for group in layer.groups)))
        for layer in structure.layers
    )
    return dataclasses.replace(structure, layers=layers, kept=kept | dict(structure.kept))


def _as_served(group: InputGroup, known: Served) -> InputGroup | None:
    """None where nothing of it can be served quantized."""
    linears = [
        dataclasses.replace(
            linear, row_parallel=linear.row_parallel or linear.name.rpartition(".")[2] in known.cut
        )
        for linear in group
        if not _plain_place(linear, known)
    ]
    return InputGroup.of(linears) if linears else None


def _plain_place(linear: Linear, known: Served) -> str | None:
    """Where vLLM holds a linear that it cannot serve quantized; experts are no linears there."""
    if linear.routed:
        return None
    places = (place for name, place in known.plain.items() if linear.name.endswith(f".{name}"))
    return next(places, None)


def _read(sources: Sources, architecture: str) -> Served:
    if architecture not in sources.registered:
        return Served()
    built = [layer for node in sources.reached(architecture) for layer in _built(node)]
    cut = {layer.attribute for layer in built if layer.kind == "RowParallelLinear"}
    # Names in a tower for images say nothing about the decoder, which has classes of its own.
    plain = _plain(sources, architecture, built) if architecture in sources.text_models else {}
    return Served(_head_fault(sources, architecture), plain, tuple(sorted(cut)))


# --- linears


class _Built(NamedTuple):
    """``self.<attribute> = <kind>(...)`` in a class."""

    owner: str
    attribute: str
    kind: str
    configured: bool


@functools.cache
def _built(node: ast.ClassDef) -> list[_Built]:
    """vLLM's linears that a class builds, and all else to which it gives a quantization config."""
    return [
        _Built(node.name, target.attr, call.func.id, configured)
        for part in ast.walk(node)
        if isinstance(part, ast.Assign | ast.AnnAssign) and part.value
        if isinstance(target := target_of(part), ast.Attribute)
        for call in ast.walk(part.value)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if (configured := _gets_config(call)) or _is_linear(call.func.id)
    ]


def _is_linear(kind: str) -> bool:
    return kind.endswith("ParallelLinear") or kind == "ReplicatedLinear"


def _gets_config(call: ast.Call) -> bool:
    unpacked = any(keyword.arg is None for keyword in call.keywords)  # which may have one
    return unpacked or argument(call, "quant_config") is not None


def _plain(sources: Sources, architecture: str, built: Iterable[_Built]) -> dict[str, str]:
    """See :class:`Served`; one that is loaded into several places must be plain in all of them."""
    places: dict[str, _Built] = {}
    configured: set[str] = set()
    for layer in built:
        places.setdefault(layer.attribute, layer)
        if layer.configured:
            configured.add(layer.attribute)
    loaded_into: dict[str, set[str]] = {name: {name} for name in places}
    for node in sources.reached(architecture):
        for part, whole in _stacked(node):
            loaded_into.setdefault(part, set()).add(whole)
    found: dict[str, str] = {}
    for name, attributes in sorted(loaded_into.items()):
        if attributes <= places.keys() - configured:
            place = places[min(attributes)]
            found[name] = f"{place.owner}.{place.attribute}"
    return found


@functools.cache
def _stacked(node: ast.ClassDef) -> list[tuple[str, str]]:
    """Names of linears in a checkpoint, and the attribute that holds several of them.

    As ``packed_modules_mapping`` has them, or the tuples (attribute, name, part) of a loader, in
    which names may have several parts.
    """
    found: list[tuple[str, str]] = []
    for part in ast.walk(node):
        if isinstance(part, ast.Tuple) and len(part.elts) == 3:
            whole, name, _ = map(_text, part.elts)
            if whole and name:
                found.append((name.strip("."), whole.rpartition(".")[2]))
        elif isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == _PACKED:
            found += _packed(part.value)
    return found


_PACKED = "packed_modules_mapping"


def _packed(mapping: ast.expr) -> Iterator[tuple[str, str]]:
    if not isinstance(mapping, ast.Dict):
        return
    for whole, names in zip(mapping.keys, mapping.values, strict=True):
        for name in names.elts if isinstance(names, ast.List) else ():
            if _text(whole) and _text(name):
                yield _text(name), _text(whole)


def _text(node: ast.expr | None) -> str:
    """A constant that is a text, else an empty one."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


# --- the head


def _head_fault(sources: Sources, architecture: str) -> str | None:
    classes = sources.classes(architecture)
    heads = [head for found in classes for head in _heads(sources, found, set())]
    if classes and not heads:
        return None if any(_wraps_any_model(found.node) for found in classes) else NO_HEAD
    return next((fault for fault in map(_fault_of_call, heads) if fault), None)


def _heads(sources: Sources, definition: Definition, seen: set[int]) -> Iterator[ast.Assign]:
    """Assignments of a head in a class, or else in the classes that it names or asks for."""
    if id(definition.node) in seen:
        return
    seen.add(id(definition.node))
    if own := [part for part in ast.walk(definition.node) if _is_head(part)]:
        yield from own
        return
    for named in sources.named(definition):
        yield from _heads(sources, named, seen)


def _is_head(node: ast.AST) -> TypeGuard[ast.Assign]:
    """Whether this is ``self.<name> = ParallelLMHead(...)``, perhaps one of two choices."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and any(calls(part, "ParallelLMHead") for part in ast.walk(node.value))
    )


def _fault_of_call(assignment: ast.Assign) -> str | None:
    target = assignment.targets[0]
    assert isinstance(target, ast.Attribute)
    call = next(p for p in ast.walk(assignment.value) if calls(p, "ParallelLMHead"))
    assert isinstance(call, ast.Call)
    if argument(call, "quant_config") is None:
        return NO_CONFIG
    prefix = argument(call, "prefix")
    if not isinstance(prefix, ast.Call) or not calls(prefix, "maybe_prefix"):
        return NO_NAME
    return None if _text(prefix.args[-1]) == target.attr else NO_NAME


def _wraps_any_model(node: ast.AST) -> bool:
    """Whether another model class is built inside, which depends on the checkpoint."""
    found = [part for part in ast.walk(node) if calls(part, "init_vllm_registered_model")]
    return any(
        "architectures" not in {keyword.arg for keyword in call.keywords}
        for call in found
        if isinstance(call, ast.Call)
    )
