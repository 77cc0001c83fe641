"""Check the demo's requirements before anything is started."""

import importlib.util
from pathlib import Path

GIB = 1 << 30

MEMORY = 8 * GIB
"""Bytes of memory that three servers, MinIO and the agents need at their peak."""

MODULES = {
    "sglang": "SGLang 0.5.23",
    "sglang_router": "SGLang's router",
    "sglang_cpu_platform": "the distribution in cpu-platform/",
    "matplotlib": "matplotlib",
}


class DemoError(Exception):
    """The demo cannot continue. The message is one line that says why and what to do."""


def check_needs() -> None:
    """Raise `DemoError` if a package or memory is missing."""
    missing = [what for name, what in MODULES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"not installed: {', '.join(missing)}; run `make setup`")
    available = available_memory()
    if available < MEMORY:
        raise DemoError(
            f"the demo needs {MEMORY // GIB} GiB of memory, but only {available / GIB:.1f} GiB are "
            "available; stop other programs"
        )


def available_memory() -> int:
    """Return `MemAvailable` of proc(5) in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024
