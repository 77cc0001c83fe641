"""Report what an SGLang version changes in the parts that this project uses."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from memkv_sglang.patching.errors import PatchError
from memkv_sglang.patching.series import read_series, series_folder
from memkv_sglang.plugin.versions import NEWEST
from tools.sglang_diff import tables, used
from tools.sglang_diff.compare import Change, Kind, compare
from tools.sglang_diff.source import Source
from tools.sglang_diff.wheels import FetchError, check, fetch

GROUPS = {
    "hooked functions": used.hooked,
    "other functions, classes and attributes that the tier uses": used.used,
    "what only the CPU platform uses": used.used_by_cpu_platform,
}


def report(old: Path, new: Path, known: str) -> Iterator[str]:
    """Yield the lines of a report on two unpacked versions; `known` is the old one's number."""
    changes = {
        title: list(compare(Source(old), Source(new), names())) for title, names in GROUPS.items()
    }
    for title, found in changes.items():
        yield from _summary(title, found)
    yield from _tables(old, new)
    yield from _patches(new, known)
    yield from _diffs([change for found in changes.values() for change in found])


def _summary(title: str, changes: list[Change]) -> Iterator[str]:
    counts = Counter(change.kind for change in changes)
    yield f"== {title}: " + ", ".join(
        f"{counts[kind]} {kind.value}" for kind in Kind if counts[kind]
    )
    for kind in Kind:
        if kind is not Kind.UNCHANGED:
            yield from (f"{kind.value:18} {c.name}" for c in changes if c.kind is kind)
    yield ""


def _tables(old: Path, new: Path) -> Iterator[str]:
    yield "== names that the project's tables do not know"
    for table, names in tables.unclassified(new).items():
        yield from (f"{table}: {name}" for name in sorted(names))
    yield from (f"server argument removed: {name}" for name in sorted(tables.removed(old, new)))
    for name in sorted(tables.new_variables(Source(old), Source(new))):
        yield f"new environment variable, part of namespaces because of its name: {name}"
    yield ""


def _patches(new: Path, known: str) -> Iterator[str]:
    yield f"== files that the patches for {known} change"
    try:
        states = tables.patched_files(read_series(series_folder(), known), new)
    except PatchError as error:
        yield str(error)
    else:
        yield from (f"{state:10} {path}" for path, state in states.items())
    yield ""


def _diffs(changes: list[Change]) -> Iterator[str]:
    for change in changes:
        if change.diff:
            yield f"== {change.name}: {change.kind.value}"
            yield change.diff
            yield ""


def main() -> int:
    """Print the report; return the exit status."""
    parser = argparse.ArgumentParser(prog="make sglang-diff", description=__doc__)
    parser.add_argument("version", help="the version to assess")
    parser.add_argument("--known", default=NEWEST, help=f"compare with this one (default {NEWEST})")
    options = parser.parse_args()
    try:
        check(options.version)  # before anything is downloaded
        old, new = fetch(options.known), fetch(options.version)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in report(old, new, options.known):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
