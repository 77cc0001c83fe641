"""Find definitions in an unpacked package by their dotted names, from its syntax trees."""

import ast
import functools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Definition(NamedTuple):
    """A function, class, value or module of the package."""

    module: str
    node: ast.AST
    """The statement with the definition, or the `ast.Module` of a module."""
    text: str
    """The definition's source, without its indentation."""

    @property
    def place(self) -> str:
        """Return module and line."""
        return f"{self.module}:{getattr(self.node, 'lineno', 1)}"


class Source:
    """The source of a package; `root` is the directory that contains it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, name: str) -> Definition | None:
        """Return the definition of a dotted name; None if the package does not define it.

        Follows imports and base classes. An attribute that only methods set counts as defined.
        """
        return self._find(name, frozenset())

    def members(self, name: str) -> dict[str, Definition]:
        """Return the members in the body of a class, or the classes of a module, by name."""
        found = self.find(name)
        if found is None or not isinstance(found.node, ast.ClassDef | ast.Module):
            return {}
        lines = self._lines(found.module)
        return {
            each: _definition(found.module, statement, lines)
            for statement in _statements(found.node.body)
            for each in _names(statement)
        }

    def _find(self, name: str, seen: frozenset[str]) -> Definition | None:
        if name in seen:
            return None
        seen |= {name}
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            module = ".".join(parts[:count])
            tree = self._tree(module)
            if tree is not None:
                rest = parts[count:]
                if not rest:
                    return Definition(module, tree, "")
                return self._in_module(module, tree, rest, seen)
        return None

    def _in_module(
        self, module: str, tree: ast.Module, names: Sequence[str], seen: frozenset[str]
    ) -> Definition | None:
        first, rest = names[0], names[1:]
        for statement in _statements(tree.body):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == first:
                        target = ".".join([self._imported(module, statement), alias.name, *rest])
                        return self._find(target, seen)
            elif first in _names(statement):
                if rest:
                    return self._in_class(module, statement, rest, seen)
                return _definition(module, statement, self._lines(module))
        return None

    def _in_class(
        self, module: str, node: ast.AST, names: Sequence[str], seen: frozenset[str]
    ) -> Definition | None:
        if not isinstance(node, ast.ClassDef):
            return None
        lines = self._lines(module)
        (name, *rest), body = names, list(_statements(node.body))
        for statement in body:
            if name in _names(statement):
                if rest:
                    return self._in_class(module, statement, rest, seen)
                return _definition(module, statement, lines)
        for method in body:
            for inner in ast.walk(method):
                if isinstance(inner, ast.Assign | ast.AnnAssign) and _sets(inner, name):
                    return _definition(module, inner, lines)
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self._find(f"{module}.{ast.unparse(base)}.{'.'.join(names)}", seen)
            if found is not None:
                return found
        return None

    def _imported(self, module: str, statement: ast.ImportFrom) -> str:
        """Return the absolute name of the module that a `from ... import` names."""
        if not statement.level:
            return statement.module or ""
        parts = module.split(".")
        above = statement.level - (self._path(module).name == "__init__.py")
        return ".".join([*parts[: len(parts) - above], *filter(None, [statement.module])])

    def _path(self, module: str) -> Path:
        path = self._root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    @functools.cache  # noqa: B019 (a source lives as long as the program)
    def _tree(self, module: str) -> ast.Module | None:
        path = self._path(module)
        if path.name == "__init__.py" and not path.exists():
            return ast.Module([], []) if path.parent.is_dir() else None
        return ast.parse(path.read_bytes()) if path.exists() else None

    @functools.cache  # noqa: B019
    def _lines(self, module: str) -> list[str]:
        path = self._path(module)
        return path.read_text().splitlines() if path.exists() else []


def _definition(module: str, node: ast.AST, lines: list[str]) -> Definition:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(each.lineno for each in decorators)])  # type: ignore[attr-defined]
    text = "\n".join(lines[first - 1 : node.end_lineno])  # type: ignore[attr-defined]
    return Definition(module, node, textwrap.dedent(text))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield all statements, including those inside conditions and `try` blocks."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try | ast.With):
            yield from _statements(statement.body)
            yield from _statements(getattr(statement, "orelse", []))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)
        else:
            yield statement


def _names(statement: ast.AST) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(statement, Function | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _sets(statement: ast.Assign | ast.AnnAssign, name: str) -> bool:
    """Return whether a statement in a method sets `self.name`."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return any(
        isinstance(each, ast.Attribute) and each.attr == name
        for target in targets
        for each in (target.elts if isinstance(target, ast.Tuple) else [target])
    )
