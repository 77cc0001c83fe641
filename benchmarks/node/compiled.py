"""Compile this benchmark's C files when they are needed."""

import ctypes
import hashlib
import subprocess
import sysconfig
from pathlib import Path

from memkv_testbed.server_binaries import cache_directory

from benchmarks.base import tool


def library(name: str) -> ctypes.CDLL:
    """Compile `name`.c if needed, and load it. Its functions run without the GIL.

    Raises `MissingToolError` without a compiler.
    """
    source = Path(__file__).with_name(f"{name}.c")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    target = cache_directory() / f"bench-{name}-{digest}{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}-new")
        include = f"-I{sysconfig.get_path('include')}"
        options = ["-O2", "-D_GNU_SOURCE", "-shared", "-fPIC", include]
        command = [tool("gcc"), *options, "-o", str(scratch), str(source), "-lrt"]
        subprocess.run(command, check=True)
        scratch.replace(target)
    return ctypes.CDLL(str(target))
