"""vLLM's model classes, found in vLLM's source files, which are parsed and never imported.

A name in a file is followed to its definition, through the file's imports from vLLM's models and
layers. Where the device decides which class is used, all of them count.
"""

import ast
import functools
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_REGISTRY = "model_executor/models/registry.py"
_TEXT, _MULTIMODAL = "_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS"


class Definition(NamedTuple):
    """A class, or an assignment such as a table of classes, at the top level of a file."""

    path: Path
    node: ast.stmt


class Sources:
    """vLLM's package directory.

    Attributes:
        text_models: architecture -> module and class, of models for text only.
        registered: the same of all models that generate text.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        registry = _parsed(root / _REGISTRY)
        self.text_models = dict(_registered(registry, _TEXT))
        self.registered = self.text_models | dict(_registered(registry, _MULTIMODAL))

    def classes(self, architecture: str) -> list[Definition]:
        """The model class of a registered architecture; several if the device decides."""
        module, name = self.registered[architecture]
        if module.startswith("vllm."):
            path = _file(self._root.joinpath(*module.split(".")[1:]))
        else:
            path = _file(self._root / "model_executor/models" / module)
        return self._find(path, name) if path else []

    def named(self, definition: Definition) -> list[Definition]:
        """What a definition names, and the models that it asks vLLM's registry for."""
        found: list[Definition] = []
        for name in _names(definition.node):
            found += self._find(definition.path, name)
        if isinstance(definition.node, ast.ClassDef):
            for text in _texts(definition.node):
                if text in self.registered:
                    found += self.classes(text)
        return found

    def reached(self, architecture: str) -> list[ast.ClassDef]:
        """The model class, the classes that it names, those that these name, and so on."""
        ways, seen = self.classes(architecture), set[int]()
        classes: list[ast.ClassDef] = []
        while ways:
            definition = ways.pop()
            if id(definition.node) in seen:
                continue
            seen.add(id(definition.node))
            if isinstance(definition.node, ast.ClassDef):
                classes.append(definition.node)
            ways += self.named(definition)
        return classes

    def _find(self, path: Path, name: str) -> list[Definition]:
        if node := _definitions(path).get(name):
            return [Definition(path, node)]
        imported = _imports(path, self._root).get(name, ())
        return [found for file, original in imported for found in self._find(file, original)]


def installed_vllm() -> Path | None:
    """The directory of the installed vLLM, which is not imported."""
    spec = find_spec("vllm")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places and (Path(places[0]) / _REGISTRY).is_file() else None


def target_of(assignment: ast.Assign | ast.AnnAssign) -> ast.expr:
    """What is assigned to; the first of several."""
    return assignment.targets[0] if isinstance(assignment, ast.Assign) else assignment.target


def calls(node: ast.AST, name: str) -> bool:
    """Whether this calls a function or class of that name."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def argument(call: ast.Call, name: str) -> ast.expr | None:
    """The value of a keyword; None where it is not given, or is None."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return None if isinstance(value, ast.Constant) and value.value is None else value


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


def _file(module: Path) -> Path | None:
    """The file of a module or of a package, given without its suffix."""
    files = (module.with_suffix(".py"), module / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])


@functools.cache
def _definitions(path: Path) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in _parsed(path).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
            target := target_of(node), ast.Name
        ):
            found[target.id] = node
    return found


@functools.cache
def _names(node: ast.stmt) -> list[str]:
    names = (part.id for part in ast.walk(node) if isinstance(part, ast.Name))
    return list(dict.fromkeys(names))


@functools.cache
def _texts(node: ast.stmt) -> list[str]:
    constants = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return list(dict.fromkeys(value for value in constants if isinstance(value, str)))


@functools.cache
def _imports(path: Path, root: Path) -> dict[str, list[tuple[Path, str]]]:
    """Name that is imported from vLLM's models or layers -> files, with its name there."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for node in _imports_from(_parsed(path)):
        parts = node.module.split(".") if node.module else []
        if node.level:
            folder = path.parents[node.level - 1]
        elif parts and parts[0] == "vllm":
            folder, parts = root, parts[1:]
        else:
            continue
        file = _file(folder.joinpath(*parts))
        if file and not {"models", "layers"}.isdisjoint(file.relative_to(root).parts):
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, []).append((file, alias.name))
    return found


def _imports_from(module: ast.Module) -> Iterable[ast.ImportFrom]:
    """All such imports, also those that depend on the device."""
    return (node for node in ast.walk(module) if isinstance(node, ast.ImportFrom))
