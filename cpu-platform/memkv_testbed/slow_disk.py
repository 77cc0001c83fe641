"""Make a disk slow or unresponsive for some processes with the kernel's I/O throttling.

Needs root and the blkio controller of cgroup v1, or the io controller of v2.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

_V1 = Path("/sys/fs/cgroup/blkio")
_V2 = Path("/sys/fs/cgroup")
HUNG = 1
"""Bytes per second with which no request completes before the limit is lifted."""


class SlowDisk:
    """Limits reads of some processes from one directory's disk."""

    def __init__(self, directory: Path) -> None:
        """Create a control group without limits. Raises `OSError` if that is not possible."""
        self._device = _device(directory)
        self._v1 = (_V1 / "blkio.throttle.read_bps_device").exists() or (
            _V1 / "cgroup.procs"
        ).exists()
        self._group = Path(tempfile.mkdtemp(prefix="memkv-", dir=_V1 if self._v1 else _V2))
        try:
            self.limit_reads(None)
        except OSError:
            self.close()
            raise

    def add(self, pid: int) -> None:
        """Limit the process and its future children."""
        (self._group / "cgroup.procs").write_text(str(pid))

    def limit_reads(self, rate: int | None) -> None:
        """Set the limit in bytes per second; None for no limit. Pending requests continue."""
        if self._v1:
            name, text = "blkio.throttle.read_bps_device", f"{self._device} {rate or 0}"
        else:
            name, text = "io.max", f"{self._device} rbps={rate or 'max'}"
        (self._group / name).write_text(text)

    def close(self) -> None:
        """Lift the limit and remove the group. Its processes return to the parent group."""
        with suppress(OSError):
            self.limit_reads(None)
        for pid in (self._group / "cgroup.procs").read_text().split():
            with suppress(OSError):  # the process has ended meanwhile
                (self._group.parent / "cgroup.procs").write_text(pid)
        with suppress(OSError):  # zombies keep the group alive for a moment
            self._group.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _device(directory: Path) -> str:
    """Return major and minor number of the whole disk that a directory is on."""
    number = directory.stat().st_dev
    sys = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    if (sys / "partition").exists():
        sys = sys.parent
    return (sys / "dev").read_text().strip()
