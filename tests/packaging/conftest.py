"""The archives under test, built once per run."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.packaging.environments import ROOT, UV, check


class Archives(NamedTuple):
    """Paths of one distribution's archives."""

    sdist: Path
    wheel: Path


def build(source: Path, folder: Path) -> Archives:
    """Build the sdist, then the wheel from the sdist alone and without network."""
    check(UV, "build", "--quiet", "--sdist", "--out-dir", folder, source)
    sdist = next(folder.glob("*.tar.gz"))
    # Building the sdist has put all build requirements into uv's cache.
    check(UV, "build", "--quiet", "--wheel", "--offline", "--out-dir", folder, sdist)
    return Archives(sdist, next(folder.glob("*.whl")))


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Build sglang-memkv."""
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def platform_archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Build sglang-cpu-platform."""
    return build(ROOT / "cpu-platform", tmp_path_factory.mktemp("cpu-platform"))
