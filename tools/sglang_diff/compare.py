"""Compare definitions of two versions."""

import ast
import difflib
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

from tools.sglang_diff.source import Definition, Function, Source


class Kind(Enum):
    """How a definition differs. The most serious kind is the first."""

    GONE = "gone"
    SIGNATURE = "signature changed"
    BODY = "body changed"
    NEW = "new"
    UNCHANGED = "unchanged"
    UNKNOWN = "in neither version"


class Change(NamedTuple):
    """A definition in two versions."""

    name: str
    kind: Kind
    diff: str = ""
    """Unified diff; empty if the definition is not in both versions."""


def compare(old: Source, new: Source, names: Iterable[str]) -> Iterator[Change]:
    """Yield how each definition changed. Of a class, only the interface is compared."""
    for name in names:
        before, after = old.find(name), new.find(name)
        if before is None or after is None:
            kind = Kind.GONE if before else Kind.NEW if after else Kind.UNKNOWN
            yield Change(name, kind)
        elif isinstance(before.node, ast.ClassDef) and isinstance(after.node, ast.ClassDef):
            yield _interface(name, old, new)
        else:
            yield _definition(name, before, after)


def _definition(name: str, before: Definition, after: Definition) -> Change:
    if _signature(before.node) != _signature(after.node):
        kind = Kind.SIGNATURE
    elif _content(before.node) != _content(after.node):
        kind = Kind.BODY
    else:
        return Change(name, Kind.UNCHANGED)
    return Change(name, kind, _diff(before.text, after.text, before.place, after.place))


def _interface(name: str, old: Source, new: Source) -> Change:
    before, after = (
        [_outline(each, node) for each, node in source.members(name).items()]
        for source in (old, new)
    )
    if before == after:
        return Change(name, Kind.UNCHANGED)
    text = _diff("\n".join(before), "\n".join(after), name, name)
    return Change(name, Kind.SIGNATURE, text)


def _outline(name: str, member: Definition) -> str:
    if isinstance(member.node, Function | ast.ClassDef):
        return f"{name}{_signature(member.node)}"
    return ast.unparse(member.node)


def _signature(node: ast.AST) -> str:
    """Return the parts of a definition that its callers depend on."""
    if isinstance(node, Function):
        decorators = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
        kind = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
        return f"{decorators}{kind}({ast.unparse(node.args)})"
    return type(node).__name__


def _content(node: ast.AST) -> str:
    """Return a definition without comments and docstring."""
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, Function) and ast.get_docstring(node) is not None:
        return "\n".join(map(ast.dump, node.body[1:]))
    if isinstance(node, Function):
        return "\n".join(map(ast.dump, node.body))
    return ast.dump(node)


def _diff(before: str, after: str, old_place: str, new_place: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), old_place, new_place, lineterm=""
    )
    return "\n".join(lines)
