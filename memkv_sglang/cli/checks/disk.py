"""Check the NVMe tier's directory and disk."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from memkv_sglang.cli.output import human_size
from memkv_sglang.config.environment import check_capacity, check_directory, existing_part
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.finding import Finding, split_problem


def check_disk(loaded: LoadedConfig) -> Iterator[Finding]:
    """Check each directory, the size and free space of its file system, and O_DIRECT."""
    disks = loaded.config.nvme.for_each_directory()
    if not disks:
        yield Finding("ok", "directory", "no NVMe tier is configured")
    for disk in disks:
        yield from _check_one(disk, loaded)
    yield from _shared_devices([Path(disk.directory) for disk in disks])


def _check_one(config: NvmeConfig, loaded: LoadedConfig) -> Iterator[Finding]:
    try:
        check_directory(config, loaded.name)
    except ConfigError as error:
        yield split_problem("directory", str(error))
        return
    directory = Path(config.directory)
    yield _directory(directory)
    try:
        check_capacity(config, loaded.name)
    except ConfigError as error:
        yield split_problem("capacity", str(error))
    else:
        yield _free_space(directory, config.capacity)
    yield _direct_io(existing_part(directory), config.direct_io)


def _shared_devices(directories: Sequence[Path]) -> Iterator[Finding]:
    """Report directories on the same device: they are no faster than one directory."""
    by_device: dict[int, list[Path]] = defaultdict(list)
    for directory in directories:
        with suppress(OSError):  # other checks report this
            by_device[existing_part(directory).stat().st_dev].append(directory)
    for together in by_device.values():
        if len(together) > 1:
            yield Finding(
                "warn",
                "devices",
                f"{', '.join(map(str, together))} are on the same device",
                "name one directory per disk, or mount the disks that are missing",
            )


def _directory(directory: Path) -> Finding:
    if not directory.exists():
        return Finding("ok", "directory", f"{directory} will be created")
    if directory.stat().st_mode & 0o077:
        return Finding(
            "warn",
            "directory",
            f"other users can access {directory}, which reveals prompts",
            f"chmod 700 {directory}",
        )
    return Finding("ok", "directory", f"{directory} is private and writable")


def _free_space(directory: Path, capacity: int) -> Finding:
    free = shutil.disk_usage(existing_part(directory)).free
    held = _allocated(directory)
    detail = f"{human_size(free)} free, {human_size(held)} used, capacity {human_size(capacity)}"
    if free + held < capacity:
        advice = f"free space, or set nvme.capacity to {human_size(free + held)} or less"
        return Finding("warn", "free space", detail, advice)
    return Finding("ok", "free space", detail)


def _allocated(directory: Path) -> int:
    """Return the disk space of the tier's segments in bytes."""
    segments = (directory / "segments").glob("*")
    return sum(path.stat().st_blocks * 512 for path in segments)


def _direct_io(place: Path, wanted: str) -> Finding:
    if wanted == "never":
        return Finding("ok", "O_DIRECT", "turned off (nvme.direct_io = never)")
    # The file has no name, so it is removed when it is closed.
    flags = os.O_RDWR | os.O_DIRECT | os.O_TMPFILE
    try:
        os.close(os.open(place, flags, 0o600))
    except OSError as error:
        return Finding(
            "FAIL" if wanted == "always" else "warn",
            "O_DIRECT",
            f"not supported on {place} ({error.strerror}): the page cache is used",
            "put nvme.directory on a local disk with ext4 or XFS",
        )
    return Finding("ok", "O_DIRECT", f"works on the file system of {place}")
