"""Run agents and clients of other versions of the package, from the repository's history."""

import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

AGENT = "import sys; from memkv_sglang.cli.main import main; sys.exit(main(['agent']))"

_RELEASE = re.compile(r"v?\d+\.\d+\.\d+")


def unpack(revision: str, target: Path) -> None:
    """Write the package of a revision below `target`. Raises `subprocess.CalledProcessError`."""
    with tarfile.open(fileobj=io.BytesIO(_git("archive", revision, "memkv_sglang"))) as archive:
        archive.extractall(target, filter="data")


def oldest_release() -> str:
    """Return the tag of the oldest release in the repository; empty if there is none."""
    try:
        tags = _git("tag", "--list", "--sort=version:refname").decode().split()
    except subprocess.CalledProcessError:  # not a repository
        return ""
    return next(filter(_RELEASE.fullmatch, tags), "")


def start(
    root: Path, program: str, environ: dict[str, str], *arguments: str
) -> subprocess.Popen[str]:
    """Start a Python program that imports the package below `root`."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, *arguments],
        env={**environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True)
    return done.stdout
