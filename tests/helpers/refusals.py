"""The words of every refusal, read from the sources of the three packages.

A refusal is a call of an error class of the project, or a line of a list of faults. A part of its
message that is only known at run time is a gap. The values of local variables, and what functions
of the project return, are looked up in the sources.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

GAP = "\N{HORIZONTAL ELLIPSIS}"
HANDED_ON = "\N{DOWNWARDS ARROW}"
"""Stands for the message of another error, which is a library's or a refusal of its own."""

# Besides QamwError and its subclasses: the errors of the two command lines, and ``explained``. It
# turns whatever the code of a model raises into a QuantizeError.
_ALSO = {"ArgumentTypeError", "RuntimeError", "explained"}
_MAX_DEPTH = 8  # of look-ups: a variable may be made of itself
_FAULTS = {"fault", "faults"}  # variables
_GAPS = re.compile(f"{GAP}+")


@dataclass(frozen=True)
class Refusal:
    """One of the places where something is refused.

    Attributes:
        place: its file and line.
        words: of the message, with gaps.
    """

    place: str
    words: str

    @property
    def has_words(self) -> bool:
        """Whether any word of the message is known before run time."""
        return re.search("[A-Za-z]", self.words) is not None

    @property
    def hands_on(self) -> bool:
        """Whether it contains the message of another error."""
        return HANDED_ON in self.words


class _Function:
    """A function, and what names stand for inside it."""

    def __init__(self, file: str, node: ast.FunctionDef) -> None:
        self.file, self.name = file, node.name
        self.nodes = list(ast.walk(node))

    @cached_property
    def assigned(self) -> dict[str, list[ast.expr]]:
        """Name of a variable -> all expressions that are assigned or added to it."""
        found: dict[str, list[ast.expr]] = {}
        for node in self.nodes:
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                    | ast.AugAssign(target=ast.Name(id=name), value=value)
                ):
                    found.setdefault(name, []).append(value)
        return found

    @cached_property
    def caught(self) -> set[str]:
        """Names of caught errors."""
        return {n.name for n in self.nodes if isinstance(n, ast.ExceptHandler) and n.name}

    @cached_property
    def returned(self) -> list[ast.expr]:
        return [n.value for n in self.nodes if isinstance(n, ast.Return) and n.value]


Part = tuple[ast.expr, _Function]
"""An expression, and where its names are looked up."""


class Sources:
    """Packages, parsed."""

    def __init__(self, files: Mapping[str, str]) -> None:
        """
        Args:
            files: name of a file -> its text.
        """
        trees = {name: ast.parse(text) for name, text in files.items()}
        nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
        self._functions = [_Function(f, n) for f, n in nodes if isinstance(n, ast.FunctionDef)]
        self._errors = _errors([node for _, node in nodes if isinstance(node, ast.ClassDef)])
        self._constants = dict(_constants(trees.values()))
        names = Counter(function.name for function in self._functions)
        self._by_name = {f.name: f for f in self._functions if names[f.name] == 1}
        self._by_place = {(f.file, f.name): f for f in self._functions}

    @staticmethod
    def of(root: Path, packages: Sequence[str]) -> "Sources":
        """Of folders inside ``root``."""
        paths = [path for package in packages for path in (root / package).rglob("*.py")]
        return Sources({str(path.relative_to(root)): path.read_text("utf-8") for path in paths})

    def refusals(self) -> list[Refusal]:
        """All of them, in the order of files and lines."""
        found = {}
        for function in self._functions:
            for node, args in [*self._calls(function), *_faults(function)]:
                words = "".join(self._words(arg, function) for arg in args)
                end = HANDED_ON if _called(node) == "explained" else ""
                place = function.file, node.lineno, node.col_offset
                found[place] = Refusal(
                    f"{function.file}:{node.lineno}", _GAPS.sub(GAP, words) + end
                )
        return [refusal for _, refusal in sorted(found.items())]

    def _calls(self, function: _Function) -> Iterator[tuple[ast.expr, list[ast.expr]]]:
        for node in function.nodes:
            if isinstance(node, ast.Call) and _called(node) in self._errors:
                yield node, node.args

    def _words(self, node: ast.expr, function: _Function, depth: int = 0) -> str:
        """The words of an expression, with gaps."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else GAP
        if _called(node) == "Option":
            return _flag(node)
        between, parts = self._parts(node, function)
        if parts and depth < _MAX_DEPTH:
            return between.join(self._words(part, of, depth + 1) for part, of in parts)
        return HANDED_ON if _mentions(node, {*function.caught, *_FAULTS}) else GAP

    def _parts(self, node: ast.expr, function: _Function) -> tuple[str, list[Part]]:
        """The text that joins the parts or possible values of an expression, and these parts."""
        match node:
            case ast.JoinedStr(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                return "", [(part, function) for part in parts]
            case ast.FormattedValue(value=part) | ast.Starred(value=part):
                return "", [(part, function)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return "", [(left, function), (right, function)]
            case ast.IfExp(body=left, orelse=right):
                return GAP, [(left, function), (right, function)]
            case ast.Name(id=name) if name not in _FAULTS and name in function.assigned:
                return GAP, [(value, function) for value in function.assigned[name]]
            case ast.Name(id=name) if name in self._constants:
                return "", [(self._constants[name], function)]
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(ast.Name("self"), name)):
                own = self._by_place.get((function.file, name))
                called = own or self._by_name.get(name)
                if called and not _mentions(node, function.caught):
                    return GAP, [(value, called) for value in called.returned]
        return "", []


def _errors(classes: Sequence[ast.ClassDef]) -> set[str]:
    """Names of classes, and of functions, whose calls refuse something."""
    found: set[str] = set()
    new = {"QamwError", *_ALSO}
    while new - found:
        found |= new
        new = {c.name for c in classes if any(_name(base) in found for base in c.bases)}
    return found


def _constants(trees: Iterable[ast.Module]) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of the string constants of modules."""
    for node in (node for tree in trees for node in tree.body):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str()) as value):
                yield name, value


def _faults(function: _Function) -> Iterator[tuple[ast.expr, list[ast.expr]]]:
    """The lines that a function adds to a list of faults, or returns as one."""
    nodes = function.nodes
    if "fault" not in function.name:
        statements = (n for n in nodes if isinstance(n, ast.Assign | ast.AugAssign | ast.Expr))
        nodes = [part for n in statements if _mentions(n, _FAULTS) for part in ast.walk(n)]
    for node in nodes:
        match node:
            case ast.JoinedStr() if " " in ast.unparse(node):
                yield node, [node]
            case ast.Return(value=ast.Constant(value=str(text)) as constant) if text:
                yield constant, [constant]


def _mentions(node: ast.AST, names: Set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _flag(option: ast.expr) -> str:
    """How the command line spells a parameter, with a gap for its value."""
    if isinstance(option, ast.Call) and isinstance(option.args[0], ast.Constant):
        return f"--{str(option.args[0].value).replace('_', '-')} {GAP}"
    return GAP


def _called(node: ast.expr) -> str:
    """The name of the function that a call calls; else nothing."""
    return _name(node.func) if isinstance(node, ast.Call) else ""


def _name(node: ast.expr) -> str:
    """The last part of a name with dots."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
