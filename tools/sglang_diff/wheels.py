"""Unpack the wheel of an SGLang version, without its dependencies."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "sglang-sources"
VERSION = re.compile(r"\d+(\.\w+)+")


class FetchError(Exception):
    """The version cannot be downloaded. The text is one line."""


def fetch(version: str) -> Path:
    """Return the directory that contains a version's package; downloads it once.

    Raises `FetchError`.
    """
    if not VERSION.fullmatch(version):
        raise FetchError(f"VERSION={version}: not a version of SGLang; write it like 0.5.23")
    target = FOLDER / version
    if not target.is_dir():
        partial = target.with_name(f"{version}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        install = ["pip", "install", "-q", "-p", sys.executable, "--no-deps", "--target"]
        done = subprocess.run(
            [uv, *install, str(partial), f"sglang=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = " ".join(done.stderr.split())
            raise FetchError(f"cannot download sglang=={version}: {reason}")
        partial.rename(target)
    return target
