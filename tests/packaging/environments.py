"""Virtual environments that contain nothing but what a test installs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]

UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))

_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MEMKV_", "XDG_CONFIG_HOME")


def run(
    *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command without this environment's Python settings; return its status and output."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    # Certificates that the system trusts may be missing from uv's own list.
    own |= {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**own, **(env or {})},
        cwd=cwd,
        timeout=240,
        check=False,
    )


def check(
    *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a command that must succeed; return its standard output."""
    done = run(*command, env=env, cwd=cwd)
    assert not done.returncode, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


class Environment:
    """An empty virtual environment with this interpreter, and pip if asked."""

    def __init__(self, path: Path, *, pip: bool = False) -> None:
        seed = ["--seed"] if pip else []
        check(UV, "venv", "--quiet", "--no-project", *seed, "--python", sys.executable, path)
        self.path = path
        self.bin = path / "bin"
        self.python = self.bin / "python"
        self._home = path / "home"
        self._home.mkdir()

    def install(self, installer: str, *packages: str | Path, env: Mapping[str, str]) -> None:
        """Install packages with `pip` or `uv`."""
        if installer == "pip":
            check(self.python, "-m", "pip", "install", "--quiet", *packages, env=env)
            return
        check(UV, "pip", "install", "--quiet", "--python", self.python, *packages, env=env)

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment, by its name in `bin`."""
        # An empty home directory: no settings of this machine's user.
        env = {"HOME": str(self._home)}
        return run(self.bin / command[0], *command[1:], env=env, cwd=self._home)

    def check(self, *command: str | Path) -> str:
        """Run a program that must succeed; return its standard output."""
        done = self.run(*command)
        assert not done.returncode, f"{command}:\n{done.stdout}{done.stderr}"
        return done.stdout
