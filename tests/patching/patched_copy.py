"""A patched copy of the installed SGLang."""

import functools
import os
import shutil
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from memkv_sglang.patching.change import apply_series
from memkv_sglang.patching.installation import find_sglang
from memkv_sglang.patching.series import read_series, series_folder

WANTED = "MEMKV_TEST_PATCHED"
"""Environment variable: when set, servers in tests run a patched SGLang without the plugin."""


def copy_sglang(directory: Path) -> Path:
    """Copy the installed package, whole, and its metadata; return the directory.

    Uses hard links if possible: patching renames new files into place and leaves the old ones.
    """
    installed = distribution("sglang")
    for name in ("sglang", f"sglang-{installed.version}.dist-info"):
        source = Path(str(installed.locate_file(name)))
        shutil.copytree(source, directory / name, copy_function=_link_or_copy)
    return directory


def make_patched_copy(directory: Path) -> Path:
    """Copy the installed package and patch the copy; return the directory."""
    copy = copy_sglang(directory)
    installation = find_sglang(copy)
    apply_series(installation.root, read_series(series_folder(), installation.version))
    return copy


def environment_of(copy: Path) -> dict[str, str]:
    """Return variables that make a server run the copy with only the CPU platform's plugin."""
    path = os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": path,
        "SGLANG_PLUGINS": "plain_cpu",
        # The page-hash source has a different path here, so PyTorch would recompile it in the
        # user's cache for this copy, and again for the next server. Without a compiler, the copy
        # falls back to hashlib, whose hashes are the same.
        "TORCH_EXTENSIONS_DIR": str(copy / "extensions"),
        "CXX": str(copy / "no-compiler"),
    }


@functools.cache
def sglang_under_test() -> dict[str, str]:
    """Return the environment for a server under test: empty, or that of a patched copy."""
    if not os.environ.get(WANTED):
        return {}
    _keep.append(tempfile.TemporaryDirectory(prefix="memkv-patched-"))
    return environment_of(make_patched_copy(Path(_keep[0].name)))


_keep: list[tempfile.TemporaryDirectory[str]] = []
"""These directories are removed when the tests' process ends."""


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
