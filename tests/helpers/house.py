"""Rules about the source tree, as functions of sources: who imports whom, and how long things are.

Sources are given as a dictionary from module names to their text, so that a test can try a rule on
a few lines as well as on the whole tree.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qamw_kernels", "offline_quantize", "qamw_vllm")
FOLDERS = {
    "qamw_kernels": ROOT / "kernels" / "qamw_kernels",
    "offline_quantize": ROOT / "offline_quantize",
    "qamw_vllm": ROOT / "qamw_vllm",
    "tools": ROOT / "tools",
    "benchmarks": ROOT / "benchmarks",
    "examples": ROOT / "examples",
    "tests": ROOT / "tests",
}
BODY = ":body"
"""Suffix of the node for a package's ``__init__`` as it runs when a module below is imported."""

Sources = Mapping[str, str]
"""Module name -> text. The ``__init__`` of a package has the name of the package."""
Graph = dict[str, set[str]]
"""Node -> the nodes that it needs."""


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        target: ``a.b`` of ``import a.b``, ``a.b.c`` of ``from a.b import c``.
        lazy: inside a function, so not run when the module is imported.
        typing_only: below ``if TYPE_CHECKING``, so never run.
        relative: with leading dots; the target lacks what they stand for.
    """

    target: str
    lazy: bool = False
    typing_only: bool = False
    relative: bool = False


def module_files() -> dict[str, Path]:
    """Every Python file of the packages, tests, benchmarks, tools and examples, by module name."""
    files = {}
    for name, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = (name, *file.relative_to(folder).with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports_of(source: str) -> list[Import]:
    """All imports of a module, at any depth of its code."""
    return list(_imports_in(ast.parse(source), lazy=False, typing_only=False))


def _imports_in(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, lazy, typing_only)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                target = ".".join(filter(None, (child.module, alias.name)))
                yield Import(target, lazy, typing_only, child.level > 0)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            # An `else` of the condition would be left out too: the tree has none.
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports_in(child, lazy or inside, typing_only or checking)


def parents(module: str) -> list[str]:
    """The packages that a module lies in, outermost first."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def resolve(target: str, sources: Sources) -> str | None:
    """The module of the tree that an import means, None for any other module."""
    return next((m for m in (target, *reversed(parents(target))) if m in sources), None)


def import_graph(sources: Sources) -> Graph:
    """What every module needs, lazy imports included.

    A module that imports ``a.b.c`` also runs the ``__init__`` of ``a`` and ``a.b``: these are nodes
    of their own, ``a:body`` and ``a.b:body``, with what an ``__init__`` imports when it runs. What
    it imports inside functions counts only for modules that import the package itself. (vLLM asks
    the package ``qamw_vllm`` for ``register``, which imports the rest lazily.) Imports for type
    checkers are left out, as they never run.
    """
    graph: Graph = {}
    for module, source in sources.items():
        above = {f"{p}{BODY}" for p in parents(module) if p in sources}
        graph[module], graph[f"{module}{BODY}"] = set(above), set(above)
        for found in imports_of(source):
            target = resolve(found.target, sources)
            if found.typing_only or target is None:
                continue
            needed = {target} | {f"{p}{BODY}" for p in parents(target) if p in sources}
            graph[module] |= needed
            if not found.lazy:
                graph[f"{module}{BODY}"] |= needed
    return graph


def folder_of(module: str) -> str:
    """The sub-folder of a package that a module lies in, or the module where it lies in none."""
    return ".".join(module.split(".")[:2])


def folder_graph(sources: Sources) -> Graph:
    """Which folders the modules of a folder import from, lazy imports included."""
    graph: Graph = {folder_of(module): set() for module in sources}
    for module, source in sources.items():
        for found in imports_of(source):
            target = resolve(found.target, sources)
            if (
                target is not None
                and not found.typing_only
                and folder_of(target) != folder_of(module)
            ):
                graph[folder_of(module)].add(folder_of(target))
    return graph


def circle(graph: Graph) -> list[str]:
    """A circle: nodes each of which the next one needs, the last being the first; or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def wrong_directions(sources: Sources, may_import: Mapping[str, set[str]]) -> list[str]:
    """Imports between top-level packages that are not allowed, those for type checkers included.

    Args:
        may_import: package -> the packages that it may import besides itself.
    """
    return [
        f"{module} imports {found.target}"
        for module, source in sources.items()
        for found in imports_of(source)
        if (package := found.target.split(".")[0]) in may_import
        and package != module.split(".")[0]
        and package not in may_import[module.split(".")[0]]
    ]


def importers(sources: Sources, package: str) -> set[str]:
    """The modules that import a package, those for type checkers included."""
    return {
        module
        for module, source in sources.items()
        if any(found.target.split(".")[0] == package for found in imports_of(source))
    }


def relative_imports(sources: Sources) -> list[str]:
    """The modules with imports that have leading dots."""
    return [m for m, source in sources.items() if any(i.relative for i in imports_of(source))]


def nested_targets(sources: Sources) -> list[str]:
    """Assignments to tuples of tuples, as ``module:line``."""
    return [
        f"{module}:{node.lineno}"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Tuple) and any(isinstance(e, ast.Tuple) for e in target.elts)
    ]


def too_long(sources: Sources, max_file: int, max_body: int) -> list[str]:
    """Files and functions with too many lines, as ``module`` and ``module:function``.

    A function's docstring does not count, only what follows.
    """
    found = []
    for module, source in sources.items():
        if len(source.splitlines()) > max_file:
            found.append(module)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                if body and (node.end_lineno or 0) - body[0].lineno + 1 > max_body:
                    found.append(f"{module}:{node.name}")
    return found
