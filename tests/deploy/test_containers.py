"""Build the images from this checkout without a container engine, and start the agent inside.

Needs root, network access to Debian and PyPI, and Debian's buildah and debootstrap.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "deploy" / "container"
TOOLS = ("buildah", "debootstrap", "unshare", "setpriv")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.getuid() != 0 or not all(map(shutil.which, TOOLS)),
        reason="needs root, buildah and debootstrap",
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Run"]:
    """Run scripts with a separate container storage."""
    directory = tmp_path_factory.mktemp("containers")
    storage = directory / "storage.conf"
    storage.write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{directory}/run"\ngraphroot = "{directory}/graph"\n'
    )
    python = {"PYTHON": sys.executable}
    yield Run({**os.environ, **python, "CONTAINERS_STORAGE_CONF": str(storage)})
    shutil.rmtree(directory)


class Run:
    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def script(self, name: str, *arguments: str) -> str:
        return self.command(str(SCRIPTS / name), *arguments)

    def command(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def base(run: Run) -> str:
    return f"localhost/{run.script('debian-base.sh').strip()}"


def test_agent_runs_in_its_image(run: Run, base: str) -> None:
    """The agent runs as a non-root user, without capabilities, on a read-only root file system."""
    assert run.script("build.sh", "agent", base).startswith("memkv-agent: ")
    output = run.script("try-agent.sh")
    assert "ready after" in output and "stopped in order" in output
    assert "Uid:\t1000\t1000\t1000\t1000" in output
    assert "CapBnd:\t0000000000000000" in output


def test_layer_for_sglang_needs_no_compiler(run: Run, base: str) -> None:
    """Plain Debian stands in for SGLang's image, which needs a registry."""
    run.script("build.sh", "sglang", base)
    container = run.command("buildah", "from", "localhost/memkv-sglang").strip()
    loop = "memkv_sglang.tiers.minio.http.bulk_loop"
    check = f"! command -v cc gcc && memkv --version && python3 -c 'import {loop}'"
    command = ("buildah", "run", "--isolation", "chroot", container, "--", "sh", "-c", check)
    assert run.command(*command).startswith("memkv ")
