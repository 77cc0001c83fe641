"""Pack everything that the trial needs, for Python 3.12 on x86-64 Linux with torch."""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

from memkv_testbed.server_binaries import (
    ServerNotFoundError,
    find_or_build_memory_server,
    find_or_build_minio,
)

from tools.gpu_trial.stubs import PARTS

ROOT = Path(__file__).parents[2]
NAME = "memkv-trial"

LIMIT = 60 << 20
"""Bytes of an archive: the machine accepts 64 MiB at a time."""

PYTHON = "3.12"

REQUIREMENTS = ("packaging", "psutil", "pydantic")
"""What SGLang's host pools need, in addition to this project's own dependencies."""

LIMITS = ("fio", "wrk")
"""Programs of the steps `gpu` and `node`."""

SYSTEM_LIBRARIES = ("ld-linux", "libc.so", "libm.so", "libpthread", "libdl", "librt", "libgcc_s")
"""Libraries that must be the machine's own."""

RUN = """\
#!/bin/sh
# Run the trial: memkv-trial/run RESULT.json. Needs python3.12 and torch for CUDA.
here=$(cd "$(dirname "$0")" && pwd)
export PATH="$here/bin:$PATH" XDG_CACHE_HOME="$here/cache" PYTHONPATH="$here/site"
export MEMKV_TRIAL_SGLANG="$here/sglang-sources" PYTHONDONTWRITEBYTECODE=1
exec "${PYTHON:-python3.12}" -m tools.gpu_trial "$@"
"""

WRAPPER = """\
#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/libexec/%s" "$@"
"""


class PackError(Exception):
    """Something to pack is missing. The text says what to do, in one line."""


def main() -> int:
    """Write the archives; return the exit status."""
    parser = argparse.ArgumentParser(prog="tools/gpu-trial pack", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the archives")
    options = parser.parse_args()
    try:
        for file in pack(options.folder):
            print(f"{file.stat().st_size / (1 << 20):5.1f} MiB  {file}")
    except (PackError, ServerNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"on the machine: cat {NAME}.tar.gz.* | tar -xz && {NAME}/run RESULT.json")
    return 0


def pack(folder: Path) -> list[Path]:
    """Write the parts of the archive; return their paths. Raises `PackError`."""
    if platform.machine() != "x86_64":
        raise PackError(
            f"this machine is {platform.machine()}; pack on x86_64, like the GPU machine"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{NAME}.tar.gz.*"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as scratch:
        trial = Path(scratch) / NAME
        python = _find_python()
        _pack_packages(trial / "site", Path(scratch), python)
        _pack_sources(trial)
        _pack_binaries(trial)
        _compile(trial, python)
        archive = Path(scratch) / "archive"
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(trial, NAME)
        return _split(archive, folder)


def _find_python() -> str:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (*pyenv.glob(f"{PYTHON}.*/bin/python"), shutil.which(f"python{PYTHON}")):
        if candidate and subprocess.run([candidate, "-V"], capture_output=True).returncode == 0:
            return str(candidate)
    raise PackError(f"Python {PYTHON} is missing; install it: uv python install {PYTHON}")


def _pack_packages(site: Path, scratch: Path, python: str) -> None:
    """Install this project's wheel and its dependencies for that Python."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    # From the sdist, so that nothing is compiled into this checkout.
    _run(uv, "build", "-q", "--sdist", "--out-dir", str(scratch), str(ROOT))
    (sdist,) = scratch.glob("*.tar.gz")
    _run(uv, "build", "-q", "--wheel", "--python", python, "--out-dir", str(scratch), str(sdist))
    (wheel,) = scratch.glob("*.whl")
    if "none-any" in wheel.name:
        raise PackError(
            f"the Cython modules were not compiled; install headers for Python {PYTHON}"
        )
    install = (uv, "pip", "install", "-q", "--python", python, "--target", str(site))
    constraints = ("--no-verify-hashes", "--constraint", str(ROOT / "locks" / "requirements.txt"))
    project = f"sglang-memkv[encryption,testing] @ {wheel.as_uri()}"
    _run(*install, *constraints, project, *REQUIREMENTS)


def _pack_sources(trial: Path) -> None:
    """Copy the benchmarks, the testbed, the trial, and SGLang's host pools."""
    ignore = shutil.ignore_patterns("__pycache__", "results", "traces", "*.so")
    site = trial / "site"
    shutil.copytree(ROOT / "benchmarks", site / "benchmarks", ignore=ignore)
    for package in ("memkv_testbed", "sglang_cpu_platform"):
        shutil.copytree(ROOT / "cpu-platform" / package, site / package, ignore=ignore)
    shutil.copytree(ROOT / "tools" / "gpu_trial", site / "tools" / "gpu_trial", ignore=ignore)
    found = find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        raise PackError("SGLang is not installed here; run make setup")
    sglang = Path(found.submodule_search_locations[0])
    for part in PARTS:
        source, target = sglang / "srt" / part, trial / "sglang-sources" / "sglang" / "srt" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)
    run = trial / "run"
    run.write_text(RUN)
    run.chmod(0o755)


def _pack_binaries(trial: Path) -> None:
    """Copy the servers, and the programs that measure the limits with their libraries."""
    cache = trial / "cache" / "sglang-memkv" / "bin"
    cache.mkdir(parents=True)
    for server in (find_or_build_minio(), find_or_build_memory_server()):
        shutil.copy(server, cache / server.name)
    for folder in ("bin", "lib", "libexec"):
        (trial / folder).mkdir()
    for name in LIMITS:
        program = shutil.which(name)
        if program is None:
            raise PackError(f"{name} is missing; install it: apt-get install {' '.join(LIMITS)}")
        shutil.copy(program, trial / "libexec" / name)
        for library in _libraries(program):
            shutil.copy(library, trial / "lib" / library.name)
        wrapper = trial / "bin" / name
        wrapper.write_text(WRAPPER % name)
        wrapper.chmod(0o755)


def _libraries(program: str) -> list[Path]:
    lines = _run("ldd", program).splitlines()
    paths = [Path(line.split(" => ")[1].split()[0]) for line in lines if " => /" in line]
    return [path for path in paths if not path.name.startswith(SYSTEM_LIBRARIES)]


def _compile(trial: Path, python: str) -> None:
    """Compile the C files of `benchmarks node` for that Python: the machine may lack a compiler."""
    code = "from benchmarks.node.compiled import library; library('floor'); library('lock')"
    environment = {
        "PYTHONPATH": str(trial / "site"),
        "XDG_CACHE_HOME": str(trial / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    _run(python, "-c", code, environment=environment)


def _split(archive: Path, folder: Path) -> list[Path]:
    parts, sums = [], []
    with archive.open("rb") as file:
        while content := file.read(LIMIT):
            part = folder / f"{NAME}.tar.gz.{len(parts):02}"
            part.write_bytes(content)
            parts.append(part)
            sums.append(f"{hashlib.sha256(content).hexdigest()}  {part.name}\n")
    (folder / f"{NAME}.sha256").write_text("".join(sums))
    return parts


def _run(*command: str, environment: dict[str, str] | None = None) -> str:
    # The system's certificates, as tools/setup.sh has it.
    certificates = {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"}
    done = subprocess.run(
        command,
        env=certificates | os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = " ".join(done.stderr.split())[-500:]
        raise PackError(f"`{' '.join(command)}` failed: {reason}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
