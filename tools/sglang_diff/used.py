"""List the parts of SGLang that this project hooks or uses, by full name."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from sglang_cpu_platform import plugin as cpu_platform

from memkv_sglang.patching.patched import SERVER_ARGS
from memkv_sglang.plugin import compatibility, hooks

ROOT = Path(__file__).parents[2]
PACKAGE = "sglang"


def hooked() -> list[str]:
    """Return the functions that the plugin or a patch wraps."""
    return [*(hook.target for hook in hooks.HOOKS), f"{SERVER_ARGS}.resolve_once"]


def used() -> list[str]:
    """Return what the plugin calls, reads or checks, in addition to the hooked functions."""
    checked = [
        f"{name}.{attribute}"
        for name, attributes in compatibility.ATTRIBUTES.items()
        for attribute in attributes.split()
    ]
    files = [*ROOT.glob("memkv_sglang/plugin/*.py"), *ROOT.glob("memkv_sglang/patching/*.py")]
    return _others([*checked, *compatibility.SIGNATURES, *imports(files)], hooked())


def used_by_cpu_platform() -> list[str]:
    """Return the functions that the CPU platform replaces, and what it calls."""
    targets = [hook.target for hook in cpu_platform.HOOKS if hook.target.startswith(PACKAGE)]
    files = ROOT.glob("cpu-platform/sglang_cpu_platform/*.py")
    return _others([*targets, *imports(files)], [*hooked(), *used()])


def imports(files: Iterable[Path]) -> Iterator[str]:
    """Yield what these modules import from SGLang, and what they use of its modules."""
    for file in sorted(files):
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE + "."):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    yield name
                    yield from (f"{name}.{each}" for each in _attributes(tree, alias))


def _attributes(tree: ast.Module, alias: ast.alias) -> set[str]:
    """Return which attributes of an imported name a module uses, without Python's own."""
    name = alias.asname or alias.name
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
        and not node.attr.startswith("__")
    }


def _others(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names that are not known, each once and in order."""
    return list(dict.fromkeys(name for name in names if name not in set(known)))
