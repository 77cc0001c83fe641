"""What the demo cannot do without, looked at before anything is started."""

import importlib.util
from pathlib import Path

GIB = 1 << 30

MEMORY = 8 * GIB
"""Bytes that three servers, MinIO and the agents take at most."""

MODULES = {
    "sglang": "SGLang 0.5.23",
    "sglang_router": "SGLang's router",
    "sglang_cpu_platform": "the distribution in cpu-platform/",
    "matplotlib": "matplotlib",
}


class DemoError(Exception):
    """The demo cannot go on; the text says in one line why, and the way out."""


def check_needs() -> None:
    """Raise `DemoError` where something is missing."""
    missing = [what for name, what in MODULES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"not installed: {', '.join(missing)}; run `make setup`")
    available = available_memory()
    if available < MEMORY:
        raise DemoError(
            f"{available / GIB:.1f} GiB of memory are available and {MEMORY // GIB} needed; "
            "end something large"
        )


def available_memory() -> int:
    """Return the bytes that can be had without swapping: `MemAvailable` of proc(5)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024
