"""The series in `patches/`: a folder a SGLang version, with diffs and a manifest of checksums."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from memkv_sglang.patching.errors import PatchError
from memkv_sglang.patching.unified_diff import Hunk, apply, parse, revert

PREFIX = "sglang-"
MANIFEST = "manifest.json"


class Checksums(NamedTuple):
    """SHA-256 of a file without and with the series, in hexadecimal; None: there is no file."""

    before: str | None
    after: str | None


class Series(NamedTuple):
    """Diffs for one version of SGLang."""

    version: str
    hunks: dict[str, list[list[Hunk]]]
    """By path below site-packages: what each diff does to the file."""
    manifest: dict[str, Checksums]
    """By the same paths. A file precedes those that import it."""

    def patched(self, path: str, content: bytes | None) -> bytes | None:
        """Return a file's content with the series, from that without. Raises `MismatchError`."""
        for hunks in self.hunks[path]:
            content = apply(content or b"", hunks)
        return _or_none(content, self.manifest[path].after)

    def original(self, path: str, content: bytes | None) -> bytes | None:
        """Return a file's content without the series, from that with. Raises `MismatchError`."""
        for hunks in reversed(self.hunks[path]):
            content = revert(content or b"", hunks)
        return _or_none(content, self.manifest[path].before)


def checksum(content: bytes | None) -> str | None:
    """Return the SHA-256 that a manifest has for this content."""
    return None if content is None else hashlib.sha256(content).hexdigest()


def series_folder() -> Path:
    """Return where the series lie: in the installed package, or in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "patches"
    return installed if installed.is_dir() else package.parent / "patches"


def versions(folder: Path) -> list[str]:
    """Return the versions of SGLang that there is a series for."""
    return sorted(path.parent.name.removeprefix(PREFIX) for path in folder.glob(f"*/{MANIFEST}"))


def read_series(folder: Path, version: str) -> Series:
    """Return the series for a version of SGLang. Raises `PatchError` if there is none."""
    known = versions(folder)
    if version not in known:
        raise PatchError(
            f"SGLang {version}: there are patches for {', '.join(known) or 'no version'} only; "
            "install one of these, or use the plugin, which needs no patch"
        )
    manifest = json.loads((folder / f"{PREFIX}{version}" / MANIFEST).read_bytes())
    checksums = {path: Checksums(**sums) for path, sums in manifest.items()}
    return Series(version, read_diffs(folder, version), checksums)


def read_diffs(folder: Path, version: str) -> dict[str, list[list[Hunk]]]:
    """Return what a version's diffs, in order, do to each file."""
    found: dict[str, list[list[Hunk]]] = {}
    for path in sorted((folder / f"{PREFIX}{version}").glob("*.patch")):
        for file in parse(path.read_bytes()):
            found.setdefault(file.path, []).append(file.hunks)
    return found


def _or_none(content: bytes | None, expected: str | None) -> bytes | None:
    return None if expected is None and not content else content
