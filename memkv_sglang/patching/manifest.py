"""Write the manifest of a patch series.

Usage: `python -m memkv_sglang.patching.manifest VERSION SITE_PACKAGES`

Run this after editing a patch. SITE_PACKAGES contains that version of SGLang, unpatched.
"""

import json
import sys
from pathlib import Path

from memkv_sglang.patching.series import (
    MANIFEST,
    PREFIX,
    Checksums,
    checksum,
    read_diffs,
    series_folder,
)
from memkv_sglang.patching.unified_diff import apply


def make_manifest(folder: Path, version: str, site_packages: Path) -> dict[str, Checksums]:
    """Return the checksums of every file that the series changes, new files first.

    Raises `MismatchError` if a diff does not fit.
    """
    manifest = {}
    for path, diffs in read_diffs(folder, version).items():
        file = site_packages / path
        before = file.read_bytes() if file.exists() else None
        after = before or b""
        for hunks in diffs:
            after = apply(after, hunks)
        manifest[path] = Checksums(checksum(before), checksum(after))
    return dict(sorted(manifest.items(), key=lambda item: (item[1].before is not None, item[0])))


def main() -> None:
    """Write the manifest next to the patches."""
    version, site_packages = sys.argv[1:]
    manifest = make_manifest(series_folder(), version, Path(site_packages))
    text = json.dumps({path: sums._asdict() for path, sums in manifest.items()}, indent=2)
    (series_folder() / f"{PREFIX}{version}" / MANIFEST).write_text(text + "\n")


if __name__ == "__main__":
    main()
