"""Find additions of an SGLang release that no table of this project lists."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

from memkv_sglang.patching.series import Series, checksum
from memkv_sglang.plugin import kv_arguments, namespaces
from memkv_sglang.plugin.kv_arguments import may_change_pages, names_of
from tools.sglang_diff.source import Source

FIELDS = "sglang.srt.arg_groups.fields"
"""Modules whose classes hold the server arguments."""

CONFIG = "sglang.srt.mem_cache.hicache_storage.HiCacheStorageConfig"
SCHEME = "sglang.srt.mem_cache.hicache_key_scheme.KVCacheNamespace"
VARIABLES = "sglang.srt.environ.Envs"


def server_arguments(root: Path) -> set[str]:
    """Return the names of SGLang's server arguments."""
    source = Source(root)
    modules = [*root.joinpath(*FIELDS.split(".")).glob("*.py")]
    return {
        field
        for module in modules
        for cls, definition in source.members(f"{FIELDS}.{module.stem}").items()
        if isinstance(definition.node, ast.ClassDef)
        for field in fields(source, f"{FIELDS}.{module.stem}.{cls}")
    }


def fields(source: Source, cls: str) -> set[str]:
    """Return the annotated names in the body of a class."""
    members = source.members(cls)
    return {name for name, each in members.items() if isinstance(each.node, ast.AnnAssign)}


def unclassified(root: Path) -> dict[str, set[str]]:
    """Return, by table, the names of SGLang that no table lists."""
    source = Source(root)
    tables = (kv_arguments.NAMED, kv_arguments.ELSEWHERE, kv_arguments.HARMLESS)
    return {
        "kv_arguments: server arguments": server_arguments(root) - _names(tables),
        "namespaces.STORAGE_CONFIG: fields": fields(source, CONFIG)
        - set(namespaces.STORAGE_CONFIG),
        "namespaces.COORDINATES: fields": fields(source, SCHEME) - set(namespaces.COORDINATES),
    }


def removed(old: Path, new: Path) -> set[str]:
    """Return the server arguments that only the old version has."""
    return server_arguments(old) - server_arguments(new)


def new_variables(old: Source, new: Source) -> set[str]:
    """Return the new environment variables that namespaces include because of their names."""
    added = set(new.members(VARIABLES)) - set(old.members(VARIABLES))
    return {name for name in added if may_change_pages(name)}


def patched_files(series: Series, root: Path) -> dict[str, str]:
    """Return the state of each file that a series changes."""
    return {path: _state(sums.before, root / path) for path, sums in series.manifest.items()}


def _state(before: str | None, file: Path) -> str:
    content = file.read_bytes() if file.exists() else None
    if checksum(content) == before:
        return "unchanged"
    return "gone" if content is None else "changed"


def _names(tables: Iterable[Mapping[str, str]]) -> set[str]:
    return {name for table in tables for name in names_of(table)}
