"""Faults of the disk under the agent, and of the files on it."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

from memkv_testbed.faults.base import Fault, leave_alone
from memkv_testbed.faults.cluster import Cluster

FLIPS = 1000
BLOCK = 4096
FOREIGN = "of-another-program"
BALLAST = "ballast"
MOVED = "moved"


def _fail_calls(code: str) -> Fault:
    """Return a fault that makes every read and write fail."""
    return Fault(
        f"{code} from every call",
        "nvme",
        lambda cluster: cluster.disk_fault.write_text(code),
        lambda cluster: cluster.disk_fault.unlink(),
        after_flush=True,
    )


def _fill_disk(cluster: Cluster) -> None:
    """Fill the disk as another program might; on the machine's own disk, only let writes fail."""
    if not cluster.mounted:
        cluster.disk_fault.write_text("ENOSPC")
        return
    with (cluster.disk / BALLAST).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass


def _free_disk(cluster: Cluster) -> None:
    full = cluster.disk / BALLAST if cluster.mounted else cluster.disk_fault
    full.unlink()


def _remove_directory(cluster: Cluster) -> None:
    shutil.rmtree(cluster.pages)


def _move_directory(cluster: Cluster) -> None:
    cluster.pages.rename(cluster.pages.with_name(MOVED))


def _move_directory_back(cluster: Cluster) -> None:
    cluster.pages.with_name(MOVED).rename(cluster.pages)


def _restart_agent(cluster: Cluster) -> None:
    cluster.disk_node.end_agent(signal.SIGTERM)


def _set_immutable(cluster: Cluster, *, on: bool) -> None:
    """Forbid changes in the directories by attribute, because modes alone would not stop root."""
    directories = [cluster.pages, cluster.pages / "segments"]
    if on:
        _change_mode(directories, 0o500)
    subprocess.run(["chattr", "+i" if on else "-i", *directories], check=False, capture_output=True)
    if not on:
        _change_mode(directories, 0o700)


def _change_mode(directories: list[Path], mode: int) -> None:
    for directory in directories:
        directory.chmod(mode)


def _put_foreign_files(cluster: Cluster) -> None:
    for directory in (cluster.pages, cluster.pages / "segments", cluster.pages / "namespaces"):
        (directory / FOREIGN).write_bytes(os.urandom(BLOCK))
    (cluster.pages / "segments" / "99999999.seg").write_bytes(os.urandom(BLOCK * 3))
    cluster.disk_node.end_agent()  # the next agent finds the damaged files


def _remove_foreign_files(cluster: Cluster) -> None:
    for path in cluster.pages.rglob(FOREIGN):
        path.unlink()
    (cluster.pages / "segments" / "99999999.seg").unlink(missing_ok=True)


def _segments(cluster: Cluster) -> list[Path]:
    return sorted((cluster.pages / "segments").glob("*.seg"))


def _flip_bits(path: Path, count: int) -> None:
    """Flip random bits in a file, which may be in its header, in payloads or in footers."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDWR)
    try:
        for _ in range(count):
            at = random.randrange(size)  # noqa: S311
            byte = os.pread(descriptor, 1, at)[0]
            os.pwrite(descriptor, bytes([byte ^ 1 << random.randrange(8)]), at)  # noqa: S311
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _flip_in_segments(cluster: Cluster) -> None:
    segments = _segments(cluster)
    for path in segments:
        _flip_bits(path, -(-FLIPS // len(segments)))


def _flip_in_journal(cluster: Cluster) -> None:
    """Flip bits in the journal of a killed agent, for the next one to read."""
    pid = cluster.disk_node.agent_pid()
    if pid is not None:
        # Hold the directory's lock, so that no agent starts during the flips.
        os.kill(pid, signal.SIGSTOP)
        _flip_bits(cluster.pages / "journal", 16)
        os.kill(pid, signal.SIGKILL)


def _truncate(cluster: Cluster) -> None:
    for path in _segments(cluster)[::2]:
        os.truncate(path, path.stat().st_size // 2)
    cluster.disk_node.end_agent()


def _grow(cluster: Cluster) -> None:
    for path in (*_segments(cluster)[::2], cluster.pages / "journal"):
        with path.open("ab") as file:
            file.write(os.urandom(3 * BLOCK + 17))
    cluster.disk_node.end_agent()


FAULTS = [
    Fault("file system full", "nvme", _fill_disk, _free_disk),
    _fail_calls("EIO"),
    _fail_calls("ENOSPC"),
    Fault("directory removed", "nvme", _remove_directory, _restart_agent, after_flush=True),
    Fault("directory moved", "nvme", _move_directory, _move_directory_back),
    Fault(
        "directory read-only",
        "nvme",
        lambda cluster: _set_immutable(cluster, on=True),
        lambda cluster: _set_immutable(cluster, on=False),
    ),
    Fault("foreign files", "nvme", _put_foreign_files, _remove_foreign_files),
    Fault("1,000 bits flipped", "nvme", _flip_in_segments, leave_alone, after_flush=True),
    Fault("journal flipped", "nvme", _flip_in_journal, leave_alone, after_flush=True),
    Fault("files truncated", "nvme", _truncate, leave_alone, after_flush=True),
    Fault("files grown", "nvme", _grow, leave_alone, after_flush=True),
]
