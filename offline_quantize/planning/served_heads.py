"""Which heads vLLM can serve quantized, as the sources of its model classes tell.

A quantized head needs ``ParallelLMHead(..., quant_config=..., prefix=<its name>)`` in the class
that vLLM's registry has for the architecture. Where vLLM is installed, its sources are read, and
never imported; elsewhere a list that ``tools/lm_heads.py`` made of them answers.
"""

import ast
import functools
import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

UNSERVED_HEADS = Path(__file__).with_name("unserved_heads.json")
NO_HEAD = "which has no head and makes logits with the embeddings"
NO_CONFIG = "which builds its head without a quantization config"
NO_NAME = "which does not tell the quantization config its head's name"

_REGISTRY = "model_executor/models/registry.py"
_TEXT, _MULTIMODAL = "_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS"


def fault_of_head(architecture: str, sources: Path | None = None) -> str | None:
    """Why vLLM cannot serve a quantized head of this architecture.

    Args:
        sources: vLLM's package directory; None for that of the installed vLLM, if there is one, or
            else the list that was made of it.
    Returns:
        NO_HEAD, NO_CONFIG or NO_NAME; None where it can, or is not known to vLLM's registry.
    """
    sources = sources or installed_vllm()
    if sources is None:
        fault: str | None = json.loads(UNSERVED_HEADS.read_text()).get(architecture)
        return fault
    return _Sources(sources).fault(architecture)


def unserved_heads(sources: Path, multimodal: Iterable[str]) -> dict[str, str]:
    """Architectures whose head cannot be served quantized -> why.

    Args:
        sources: vLLM's package directory.
        multimodal: the architectures to consider besides those that are for text only.
    """
    read = _Sources(sources)
    architectures = sorted({*read.text_models, *multimodal})
    faults = {architecture: read.fault(architecture) for architecture in architectures}
    return {architecture: fault for architecture, fault in faults.items() if fault}


def installed_vllm() -> Path | None:
    """The directory of the installed vLLM, which is not imported."""
    spec = find_spec("vllm")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places and (Path(places[0]) / _REGISTRY).is_file() else None


class _Sources:
    """vLLM's model classes.

    Attributes:
        text_models: architecture -> module and class, of models for text only.
        registered: the same of all models that generate text.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        registry = _parsed(root / _REGISTRY)
        self.text_models = dict(_registered(registry, _TEXT))
        self.registered = self.text_models | dict(_registered(registry, _MULTIMODAL))

    def fault(self, architecture: str) -> str | None:
        if architecture not in self.registered:
            return None
        module, name = self.registered[architecture]
        found = [path for path in self._paths(module) if name in _classes(path)]
        heads = [head for path in found for head in self._heads(path, name, set())]
        if found and not heads:
            nodes = [_classes(path)[name] for path in found]
            return None if any(map(_wraps_any_model, nodes)) else NO_HEAD
        return next((fault for fault in map(_fault_of_call, heads) if fault), None)

    def _paths(self, module: str) -> list[Path]:
        """The files of a module of the registry."""
        if module.startswith("vllm."):  # a folder, with a class for every kind of device
            return sorted(self._root.joinpath(*module.split(".")[1:]).rglob("*.py"))
        return [self._root / "model_executor/models" / f"{module}.py"]

    def _heads(self, path: Path, name: str, seen: set[tuple[Path, str]]) -> list[ast.Assign]:
        """Assignments of a head in a class, or else in the classes that it names or asks for."""
        node = _classes(path).get(name)
        if node is None or (path, name) in seen:
            return []
        seen.add((path, name))
        if own := [part for part in ast.walk(node) if _is_head(part)]:
            return own
        imported = _imports(path, self._root)
        heads: list[ast.Assign] = []
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                heads += self._heads(imported.get(part.id, path), part.id, seen)
            elif isinstance(part, ast.Constant) and part.value in self.registered:
                module, inner = self.registered[part.value]
                for inner_path in self._paths(module):
                    heads += self._heads(inner_path, inner, seen)
        return heads


def _is_head(node: ast.AST) -> TypeGuard[ast.Assign]:
    """Whether this is ``self.<name> = ParallelLMHead(...)``, perhaps one of two choices."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and any(_calls(part, "ParallelLMHead") for part in ast.walk(node.value))
    )


def _fault_of_call(assignment: ast.Assign) -> str | None:
    target = assignment.targets[0]
    assert isinstance(target, ast.Attribute)
    call = next(p for p in ast.walk(assignment.value) if _calls(p, "ParallelLMHead"))
    assert isinstance(call, ast.Call)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    config, prefix = given.get("quant_config"), given.get("prefix")
    if config is None or (isinstance(config, ast.Constant) and config.value is None):
        return NO_CONFIG
    if isinstance(prefix, ast.Call) and _calls(prefix, "maybe_prefix"):
        last = prefix.args[-1]
        if isinstance(last, ast.Constant) and last.value == target.attr:
            return None
    return NO_NAME


def _wraps_any_model(node: ast.ClassDef) -> bool:
    """Whether another model class is built inside, which depends on the checkpoint."""
    calls = [part for part in ast.walk(node) if _calls(part, "init_vllm_registered_model")]
    return any(
        "architectures" not in {keyword.arg for keyword in call.keywords}
        for call in calls
        if isinstance(call, ast.Call)
    )


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _registered(registry: ast.Module, table: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """(architecture, (module, class)) of what a table of vLLM's registry lists one by one."""
    for node in registry.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        if ast.unparse(node.targets[0]) == table:
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    module, name = ast.literal_eval(value)
                    yield str(key.value), (module, name)


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])


@functools.cache
def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _parsed(path).body if isinstance(node, ast.ClassDef)}


@functools.cache
def _imports(path: Path, root: Path) -> dict[str, Path]:
    """Name that is imported from a file of vLLM -> that file."""
    found: dict[str, Path] = {}
    for node in _parsed(path).body:
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        parts = node.module.split(".")
        if node.level:
            folder = path.parents[node.level - 1]
        elif parts[0] == "vllm":
            folder, parts = root, parts[1:]
        else:
            continue
        file = folder.joinpath(*parts).with_suffix(".py")
        if "models" in file.parts:
            found |= {alias.asname or alias.name: file for alias in node.names}
    return found
