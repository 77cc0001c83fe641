"""Each archive, installed in an empty environment, works."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import memkv_sglang
from tests.packaging.conftest import Archives
from tests.packaging.environments import ROOT, Environment


class Case(NamedTuple):
    """How one environment is made."""

    archive: str
    installer: str
    compiler: str
    """`found`, `fails` (CC=false) or `absent` (nothing in PATH)."""

    @property
    def compiled(self) -> bool:
        """Whether the installation has the compiled modules; a wheel brings them."""
        return self.archive == "wheel" or self.compiler == "found"

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables for the installer."""
        return {"found": {}, "fails": {"CC": "false"}, "absent": {"PATH": "/nowhere"}}[
            self.compiler
        ]


DEFAULT = [Case("wheel", "uv", "absent"), Case("sdist", "pip", "fails")]
"""One environment for each archive and each installer, with and without compiled modules."""

EXHAUSTIVE = [
    Case("wheel", "pip", "absent"),
    Case("sdist", "pip", "found"),
    Case("sdist", "uv", "found"),
    Case("sdist", "uv", "fails"),
    Case("sdist", "uv", "absent"),
    Case("sdist", "pip", "absent"),
]


class Installation(NamedTuple):
    """An archive and the environment that it is installed in."""

    case: Case
    environment: Environment


@pytest.fixture(
    scope="module",
    params=[*DEFAULT, *(pytest.param(case, marks=pytest.mark.slow) for case in EXHAUSTIVE)],
    ids="-".join,
)
def installed(
    request: pytest.FixtureRequest, archives: Archives, tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    """Install an archive in an environment of its own."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp("environment")
    environment = Environment(folder / "venv", pip=case.installer == "pip")
    # A path of its own: uv would reuse a wheel that it built from the same path with a compiler.
    archive = Path(shutil.copy(getattr(archives, case.archive), folder))
    environment.install(case.installer, archive, env=case.variables)
    return Installation(case, environment)


@pytest.fixture
def settings() -> Iterator[list[str]]:
    """Flags for a disk in a temporary directory, with a socket path short enough for the kernel."""
    with tempfile.TemporaryDirectory(prefix="memkv-") as folder:
        yield [
            *("--nvme-directory", f"{folder}/pages"),
            *("--nvme-capacity", "64MiB"),
            *("--agent-socket", f"{folder}/agent.sock"),
        ]


def test_version_and_tag(installed: Installation) -> None:
    environment = installed.environment
    assert memkv_sglang.__version__ in environment.check("memkv", "--version")
    (wheel,) = environment.path.glob("lib/*/site-packages/sglang_memkv-*.dist-info/WHEEL")
    assert ("Tag: py3-none-any" in wheel.read_text()) != installed.case.compiled


def test_doctor(installed: Installation, settings: list[str]) -> None:
    """A missing compiled module is a warning that says what to do."""
    found = json.loads(installed.environment.check("memkv", "doctor", "--json", *settings))
    levels = {finding["what"]: finding["level"] for finding in found}
    assert levels["installation"] == ("ok" if installed.case.compiled else "warn")
    assert levels["settings"] == "ok"
    (finding,) = (finding for finding in found if finding["what"] == "installation")
    assert bool(finding["advice"]) != installed.case.compiled


def test_doctor_without_settings(installed: Installation) -> None:
    done = installed.environment.run("memkv", "doctor")
    assert done.returncode == 1
    assert "nvme.directory" in done.stdout
    assert not done.stderr


def test_config(installed: Installation, settings: list[str]) -> None:
    shown = json.loads(installed.environment.check("memkv", "config", "--json", *settings))
    assert shown["nvme.capacity"] == {"value": 64 << 20, "from": "--nvme-capacity"}
    assert "nvme.capacity" in installed.environment.check("memkv", "config")
    refused = installed.environment.run("memkv", "config", "--nvme-capacity", "much")
    assert refused.returncode == 2
    assert "nvme-capacity" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_public_names(installed: Installation) -> None:
    """All can be imported; the storage class alone needs SGLang."""
    program = """
import memkv_sglang
for name in memkv_sglang.__all__:
    try:
        getattr(memkv_sglang, name)
    except ModuleNotFoundError as error:
        print(name, error.name)
"""
    missing = installed.environment.check("python", "-c", program).split()
    assert missing[0::2] == ["MemKVStorage"]
    assert missing[1] in {"numpy", "sglang", "torch"}


def test_testing_names_its_extra(installed: Installation) -> None:
    done = installed.environment.run("python", "-c", "import memkv_sglang.testing.conformance")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: memkv_sglang.testing needs hypothesis and pytest: "
        "run pip install 'sglang-memkv[testing]'"
    )


def test_example_spills_and_loads(installed: Installation) -> None:
    output = installed.environment.check("python", ROOT / "examples" / "client.py")
    assert "spilled 8 of 8 pages" in output
    assert "loaded 8 intact" in output


def test_testing_extra(archives: Archives, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install("uv", f"sglang-memkv[testing] @ {archives.wheel.as_uri()}", env={})
    for module in ("conformance", "pages", "state_machine"):
        environment.check("python", "-c", f"import memkv_sglang.testing.{module}")
