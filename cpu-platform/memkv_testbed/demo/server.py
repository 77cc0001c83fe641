"""Create the demo's SGLang servers."""

from pathlib import Path

from sglang_cpu_platform.fork_server import ForkServers
from sglang_cpu_platform.server import CpuServer

DEVICE_TOKENS = 24576
"""Share of a conversation that fits in the top tier. The host pool has twice as much room."""


def make_server(
    model: Path,
    home: Path,
    extra: list[str],
    env: dict[str, str],
    device_tokens: int = DEVICE_TOKENS,
    forks: ForkServers | None = None,
) -> CpuServer:
    """Return a server that runs on the CPU even if there is a GPU. It is not started yet."""
    temporary = home / "tmp"
    temporary.mkdir(parents=True)
    return CpuServer(
        model,
        log=home / "server.log",
        max_total_tokens=device_tokens,
        extra=extra,
        env={"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(temporary), **env},
        forks=forks,
    )
