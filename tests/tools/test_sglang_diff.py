"""`make sglang-diff` reports every change of what the project uses, from sources alone."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from memkv_sglang.patching.series import Checksums, Series, checksum
from memkv_sglang.plugin import hooks
from memkv_sglang.plugin.versions import NEWEST
from tools.sglang_diff import tables, used
from tools.sglang_diff.__main__ import report
from tools.sglang_diff.compare import Change, Kind, compare
from tools.sglang_diff.source import Source
from tools.sglang_diff.wheels import FetchError, fetch

Write = Callable[..., Path]

OLD = """
    import os
    from pkg.other import moved as alias

    LIMIT = 3

    class Base:
        def inherited(self, a):
            return a

    class Pool(Base):
        size: int = 0

        def __init__(self, entry):
            if entry:
                self.buffer, self.rank = entry, 0

        def load(self, keys, deadline=1.0):
            '''Load.'''
            return keys

    if os.name == "posix":
        async def send(message): ...
"""
OTHER = "def moved(x):\n    return x\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(version: str, **modules: str) -> Path:
        root = tmp_path / version
        for name, text in modules.items():
            path = root / "pkg" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return root

    return write


def changes(write: Write, edit: tuple[str, str], *names: str, other: str = OTHER) -> list[Change]:
    assert edit[0] in OLD
    old = write("old", main=OLD, other=OTHER)
    new = write("new", main=OLD.replace(*edit), other=other)
    return list(compare(Source(old), Source(new), [f"pkg.{name}" for name in names]))


NAMES = (
    "main.LIMIT",
    "main.alias",
    "main.send",
    "main.Pool.load",
    "main.Pool.inherited",
    "main.Pool.size",
    "main.Pool.rank",
)


@pytest.mark.parametrize("edit", [("", ""), ("'''Load.'''", "'''Load all.'''  # quickly")])
def test_comments_and_docstrings_do_not_count(write: Write, edit: tuple[str, str]) -> None:
    assert {change.kind for change in changes(write, edit, *NAMES)} == {Kind.UNCHANGED}


@pytest.mark.parametrize(
    ("name", "edit", "kind"),
    [
        ("main.LIMIT", ("LIMIT = 3", "LIMIT = 4"), Kind.BODY),
        ("main.LIMIT", ("LIMIT = 3", ""), Kind.GONE),
        ("main.send", ("async def", "def"), Kind.SIGNATURE),
        ("main.Pool.load", ("return keys", "return list(keys)"), Kind.BODY),
        ("main.Pool.load", ("deadline=1.0", "deadline"), Kind.SIGNATURE),
        ("main.Pool.load", ("def load", "def fetch"), Kind.GONE),
        ("main.Pool.fetch", ("def load", "def fetch"), Kind.NEW),
        ("main.Pool.inherited", ("return a", "return [a]"), Kind.BODY),
        ("main.Pool.inherited", ("Pool(Base)", "Pool"), Kind.GONE),
        ("main.Pool.size", ("int = 0", "int = 1"), Kind.BODY),
        ("main.Pool.rank", ("entry, 0", "entry, 1"), Kind.BODY),
        ("main.Pool.buffer", ("self.buffer", "self.memory"), Kind.GONE),
        ("main.Pool", ("deadline=1.0", "deadline"), Kind.SIGNATURE),
        ("main.Pool", ("return keys", "return list(keys)"), Kind.UNCHANGED),
        ("main.Nothing", ("", ""), Kind.UNKNOWN),
    ],
)
def test_changes_are_named(write: Write, name: str, edit: tuple[str, str], kind: Kind) -> None:
    (change,) = changes(write, edit, name)
    assert change.kind is kind


def test_a_change_behind_an_import_is_shown_as_a_diff(write: Write) -> None:
    (change,) = changes(write, ("", ""), "main.alias", other=OTHER.replace("return x", "return 1"))
    assert change.kind is Kind.BODY
    assert "--- pkg.other:1" in change.diff
    assert "-    return x\n+    return 1" in change.diff


def test_unclassified_server_arguments_are_listed(tmp_path: Path) -> None:
    fields = tmp_path / "sglang/srt/arg_groups/fields/memory.py"
    fields.parent.mkdir(parents=True)
    fields.write_text("class MemoryArgs:\n    page_size: int = 1\n    kv_twist: bool = False\n")
    assert tables.server_arguments(tmp_path) == {"page_size", "kv_twist"}
    assert tables.unclassified(tmp_path)["kv_arguments: server arguments"] == {"kv_twist"}


def test_changed_patched_files_are_listed(tmp_path: Path) -> None:
    contents = {"same.py": b"1", "changed.py": b"1", "gone.py": b"1", "new.py": None}
    sums = {path: Checksums(checksum(content), "x") for path, content in contents.items()}
    (tmp_path / "same.py").write_bytes(b"1")
    (tmp_path / "changed.py").write_bytes(b"2")
    assert tables.patched_files(Series("1", {}, sums), tmp_path) == {
        "same.py": "unchanged",
        "changed.py": "changed",
        "gone.py": "gone",
        "new.py": "unchanged",
    }


def test_a_version_that_does_not_exist_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.sglang_diff", "newest"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: VERSION=newest: not a version of SGLang; write it like 0.5.23\n"


def test_all_hooks_are_compared() -> None:
    assert {hook.target for hook in hooks.HOOKS} <= set(used.hooked())
    assert "sglang.srt.environ.envs" in used.used()
    assert "sglang.srt.mem_cache.hicache_storage.PoolTransfer.hit_policy" in used.used()


@pytest.mark.slow
def test_the_newest_version_has_all_that_is_used() -> None:
    try:
        root = fetch(NEWEST)
    except FetchError as error:
        pytest.skip(str(error))
    lines = list(report(root, root, NEWEST))
    assert not [line for line in lines if line.startswith((Kind.UNKNOWN.value, "gone", "changed"))]
    assert not [line for line in lines if line.startswith(("kv_arguments", "namespaces"))]
