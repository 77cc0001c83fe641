"""Read `patches/`: one folder per SGLang version with diffs and a manifest of checksums."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from memkv_sglang.patching.errors import PatchError
from memkv_sglang.patching.unified_diff import Hunk, apply, parse, revert

PREFIX = "sglang-"
MANIFEST = "manifest.json"


class Checksums(NamedTuple):
    """SHA-256 (hex) of a file before and after patching; None if it does not exist."""

    before: str | None
    after: str | None


class Series(NamedTuple):
    """The patches for one version of SGLang."""

    version: str
    hunks: dict[str, list[list[Hunk]]]
    """Hunks of each diff, by path below site-packages."""
    manifest: dict[str, Checksums]
    """Checksums by the same paths. A new file precedes the files that import it."""

    def patched(self, path: str, content: bytes | None) -> bytes | None:
        """Patch a file's content. Raises `MismatchError`."""
        for hunks in self.hunks[path]:
            content = apply(content or b"", hunks)
        return _or_none(content, self.manifest[path].after)

    def original(self, path: str, content: bytes | None) -> bytes | None:
        """Unpatch a file's content. Raises `MismatchError`."""
        for hunks in reversed(self.hunks[path]):
            content = revert(content or b"", hunks)
        return _or_none(content, self.manifest[path].before)


def checksum(content: bytes | None) -> str | None:
    """Return a content's SHA-256 as in a manifest; None for no file."""
    return None if content is None else hashlib.sha256(content).hexdigest()


def series_folder() -> Path:
    """Return the folder of all series, in the installed package or in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "patches"
    return installed if installed.is_dir() else package.parent / "patches"


def versions(folder: Path) -> list[str]:
    """Return the versions of SGLang that have a series."""
    return sorted(path.parent.name.removeprefix(PREFIX) for path in folder.glob(f"*/{MANIFEST}"))


def read_series(folder: Path, version: str) -> Series:
    """Return the series for a version of SGLang. Raises `PatchError` if there is none."""
    known = versions(folder)
    if version not in known:
        raise PatchError(
            f"SGLang {version}: patches exist only for {', '.join(known) or 'no version'}; "
            "install one of these versions, or use the plugin, which needs no patches"
        )
    manifest = json.loads((folder / f"{PREFIX}{version}" / MANIFEST).read_bytes())
    checksums = {path: Checksums(**sums) for path, sums in manifest.items()}
    return Series(version, read_diffs(folder, version), checksums)


def read_diffs(folder: Path, version: str) -> dict[str, list[list[Hunk]]]:
    """Return the hunks of a version's diffs for each file, in order."""
    found: dict[str, list[list[Hunk]]] = {}
    for path in sorted((folder / f"{PREFIX}{version}").glob("*.patch")):
        for file in parse(path.read_bytes()):
            found.setdefault(file.path, []).append(file.hunks)
    return found


def _or_none(content: bytes | None, expected: str | None) -> bytes | None:
    return None if expected is None and not content else content
