"""Unpack the wheel of an SGLang version, without its dependencies."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "sglang-sources"
VERSION = re.compile(r"\d+(\.\w+)+")


class FetchError(Exception):
    """The version cannot be downloaded. The message is one line."""


def check(version: str) -> None:
    """Raise `FetchError` if this cannot be a version number."""
    if not VERSION.fullmatch(version):
        raise FetchError(f"VERSION={version}: not a version of SGLang; write it like 0.5.23")


def fetch(version: str) -> Path:
    """Return the directory with a version's package. Downloads it only once.

    Raises `FetchError`.
    """
    check(version)
    target = FOLDER / version
    if not target.is_dir():
        partial = target.with_name(f"{version}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        install = ["pip", "install", "-q", "-p", sys.executable, "--no-deps", "--target"]
        done = subprocess.run(
            [uv, *install, str(partial), f"sglang=={version}"],
            # Use the system's certificates, as tools/setup.sh does. Newer uv reads the first
            # variable.
            env={"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1", **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = " ".join(done.stderr.split())
            raise FetchError(f"cannot download sglang=={version}: {reason}")
        partial.rename(target)
    return target
