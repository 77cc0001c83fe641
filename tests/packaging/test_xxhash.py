"""The compiled checksum calls C functions of the xxhash package, which it does not document."""

import ctypes
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import xxhash
from packaging.requirements import Requirement

from tests.packaging.conftest import Archives
from tests.packaging.environments import ROOT, Environment

TESTED = ("3.5.0", "3.6.0", "3.8.2", "4.0.0", "4.1.0")
"""One version of each release series in the declared range."""


def requirement() -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parsed = map(Requirement, project["dependencies"])
    return next(each for each in parsed if each.name == "xxhash")


def test_locked_version_is_installed_and_tested() -> None:
    lock = (ROOT / "locks" / "requirements.txt").read_text()
    locked = re.search(r"^xxhash==(\S+)", lock, re.MULTILINE)
    assert locked is not None
    assert locked[1] == version("xxhash")
    assert locked[1] in TESTED
    assert all(each in requirement().specifier for each in TESTED)


def test_locked_version_exports_the_functions() -> None:
    source = (ROOT / "memkv_sglang/tiers/minio/http/xxh3.pyx").read_text()
    names = set(re.findall(r'"(XXH\w+)"', source))
    assert len(names) == 6
    library = ctypes.CDLL(xxhash._xxhash.__file__)  # type: ignore[attr-defined]
    assert [name for name in names if not hasattr(library, name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("release", TESTED)
def test_compiled_loop_works_with(release: str, archives: Archives, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install("uv", archives.wheel, f"xxhash=={release}", env={})
    program = "from memkv_sglang.tiers.minio.objects.bulk_client import WHY_NOT; print([WHY_NOT])"
    assert environment.check("python", "-c", program) == "['']\n"
