"""Describe the machine and the software, so that readers can judge the numbers."""

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from memkv_testbed.server_binaries import MINIO_MODULE, find_or_build_minio

import memkv_sglang

PACKAGES = ("sglang", "minio", "boto3", "obstore", "nixl", "torch", "xxhash")
"""Distributions whose version matters: SGLang, our dependencies and the peers."""

PROGRAMS = {"fio": "--version", "wrk": "-v"}


def machine() -> dict[str, Any]:
    """Return processor, memory, kernel and huge-page policy."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = Path("/proc/meminfo").read_text().split(maxsplit=2)[1]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / (1 << 20), 1),
        "kernel": platform.release(),
        "huge_pages": _huge_pages(),
    }


def versions() -> dict[str, str]:
    """Return the versions of all installed software that was measured."""
    found = {"memkv_sglang": memkv_sglang.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found |= {name: _version(name, flag) for name, flag in PROGRAMS.items() if shutil.which(name)}
    # A server built from a Go module does not know its own version.
    minio = _version(str(find_or_build_minio()), "--version")
    found["minio_server"] = MINIO_MODULE.split("@")[1] if "DEVELOPMENT" in minio else minio
    return found


def _version(program: str, flag: str) -> str:
    """Return the first word with a digit in a program's version output."""
    done = subprocess.run([program, flag], capture_output=True, text=True, check=False)
    match = re.search(r"\S*\d\S*", done.stdout + done.stderr)
    return match[0] if match else "unknown"


def _huge_pages() -> str:
    """Return the kernel's policy for transparent huge pages, e.g. `madvise`."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", file.read_text()) if file.exists() else None
    return chosen[1] if chosen else "none"
