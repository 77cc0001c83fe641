"""SGLang servers of the demo, and what SGLang leaves in shared memory when it ends."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from sglang_cpu_platform.process import ProcessFailedError, group_members
from sglang_cpu_platform.server import CpuServer

DEVICE_TOKENS = 24576
"""Room in the top tier for one conversation and a half; the host pool has twice as much."""

SHARED_MEMORY = "/dev/shm/"  # noqa: S108 (where Linux keeps it)


class Server(CpuServer):
    """Started like any; its end leaves nothing."""

    def kill(self) -> None:
        """End it at once, as a crash would; idempotent."""
        left: set[Path] = set()
        with suppress(ProcessFailedError, ProcessLookupError):
            os.killpg(self.pid, signal.SIGSTOP)  # so that nothing new appears meanwhile
            left = shared_memory_of(self.pid)
        super().kill()
        for path in left:
            path.unlink(missing_ok=True)


def make_server(model: Path, home: Path, extra: list[str], env: dict[str, str]) -> Server:
    """Return a server that is not started yet, on the CPU also where there is a GPU."""
    temporary = home / "tmp"
    temporary.mkdir(parents=True)
    return Server(
        model,
        log=home / "server.log",
        max_total_tokens=DEVICE_TOKENS,
        extra=extra,
        env={"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(temporary), **env},
    )


def shared_memory_of(group: int) -> set[Path]:
    """Return the shared memory files that a process group's processes have mapped.

    SGLang 0.5.23 removes neither its load slots nor its semaphores when it is terminated.
    """
    mapped: set[Path] = set()
    for pid in group_members(group):
        with suppress(OSError):  # it has just ended
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = line[line.find("/") :]
                if path.startswith(SHARED_MEMORY) and not path.endswith(" (deleted)"):
                    mapped.add(Path(path))
    return mapped
