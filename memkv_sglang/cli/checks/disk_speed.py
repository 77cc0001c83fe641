"""Measure the disk's throughput for a few seconds."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from memkv_sglang.cli.output import human_size
from memkv_sglang.config.environment import existing_part
from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.finding import Finding
from memkv_sglang.tiers.nvme.disk.direct_io import aligned_memory

SECONDS = 2.0
"""Seconds to write, and again to read."""

PIECE = 16 * MIB
"""Bytes per request. The kernel splits a request, so one at a time keeps most disks busy."""

MOST = 64
"""Maximum number of requests that write."""

SLOW = 0.5e9
"""Bytes per second. On slower disks, loading most pages takes longer than recomputing them on a
GPU."""


def check_disk_speed(config: NvmeConfig) -> Iterator[Finding]:
    """Write and read a temporary file on each disk, for a few seconds."""
    for disk in config.for_each_directory():
        yield _check_one(disk)


def _check_one(config: NvmeConfig) -> Finding:
    place, needed = existing_part(Path(config.directory)), 2 * MOST * PIECE
    free = os.statvfs(place)
    if free.f_bavail * free.f_frsize < needed:
        return Finding("skip", "disk speed", f"{place} has less than {human_size(needed)} free")
    try:
        return _measure(place, direct=config.direct_io != "never")
    except OSError as error:
        return Finding("skip", "disk speed", f"cannot be measured on {place} ({error.strerror})")


def _measure(place: Path, *, direct: bool) -> Finding:
    flags = os.O_RDWR | os.O_TMPFILE | (os.O_DIRECT if direct else 0)
    memory = aligned_memory(PIECE)
    memory[:] = os.urandom(PIECE)  # random, because some disks compress
    file = os.open(place, flags, 0o600)  # The file has no name, so nothing is left behind.
    try:
        written, write_speed = _timed(lambda at: os.pwritev(file, [memory], at), MOST)
        _, read_speed = _timed(lambda at: os.preadv(file, [memory], at), written)
    finally:
        os.close(file)
    speeds = f"reads {read_speed / 1e9:.2g} GB/s, writes {write_speed / 1e9:.2g} GB/s in sequence"
    detail = f"{place} {speeds}"
    if min(read_speed, write_speed) < SLOW:
        advice = (
            "put nvme.directory on a local NVMe disk; `memkv bench` measures it as the tier does"
        )
        return Finding(
            "warn", "disk speed", f"{detail}: most pages are faster to recompute", advice
        )
    return Finding("ok", "disk speed", detail)


def _timed(move: Callable[[int], int], most: int) -> tuple[int, float]:
    """Make up to `most` requests in the time limit; return their number and bytes per second."""
    pieces, begin = 0, time.perf_counter()
    while pieces < most and time.perf_counter() - begin < SECONDS:
        if move(pieces * PIECE) != PIECE:
            raise OSError(0, "a request was cut short")
        pieces += 1
    return pieces, pieces * PIECE / max(time.perf_counter() - begin, 1e-9)
