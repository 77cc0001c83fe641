"""Find the installed SGLang without importing it."""

from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import NamedTuple

from memkv_sglang.patching.errors import PatchError


class Installation(NamedTuple):
    """An installed version of SGLang."""

    version: str
    root: Path
    """The directory that contains the package `sglang`, usually `site-packages`."""


def find_sglang(site_packages: Path | None) -> Installation:
    """Return the SGLang in `site_packages`; None for this Python's. Raises `PatchError`."""
    found = _distribution(site_packages)
    if found is None:
        where = f"in {site_packages}" if site_packages else "for this Python"
        raise PatchError(
            f"SGLang is not installed {where}; give --site-packages DIR, the directory that "
            "contains sglang and sglang-VERSION.dist-info"
        )
    root = Path(str(found.locate_file("")))
    if not (root / "sglang" / "srt").is_dir():
        raise PatchError(
            f"{root} has no sglang/srt: an editable installation keeps its files elsewhere; "
            "apply the series there with `git apply --directory=python`"
        )
    return Installation(found.version, root)


def _distribution(site_packages: Path | None) -> Distribution | None:
    if site_packages is None:
        return next(iter(distributions(name="sglang")), None)
    return next(iter(distributions(name="sglang", path=[str(site_packages)])), None)
